package config

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// A loader decodes files one over the other. It takes each key by itself, so
// that all mistakes are found at once and each value's origin is known.
type loader struct {
	config Config
	rules  []rule
	origin map[string]string // section.key -> file:line that set it last
	errs   []error
}

// read decodes one file over what was read before.
func (l *loader) read(file string, doc []byte) {
	var p unstable.Parser
	p.Reset(doc)
	d := document{loader: l, file: file, parser: &p}
	var section []string
	known, before := true, len(l.errs)
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			section = key(e)
			known = d.table(e, section)
		case unstable.KeyValue:
			if known {
				d.keyValue(e, section)
			}
		}
	}
	// The parser knows the syntax; only the decoder knows of a key given twice.
	if p.Error() != nil || len(l.errs) == before {
		if err := toml.Unmarshal(doc, new(map[string]any)); err != nil {
			l.errs = append(l.errs, malformed(file, err))
		}
	}
}

// malformed rewords an error about the document as such.
func malformed(file string, err error) error {
	if de := (*toml.DecodeError)(nil); errors.As(err, &de) {
		row, _ := de.Position()
		file = fmt.Sprintf("%s:%d", file, row)
	}
	return fmt.Errorf("%s: %s", file, strings.TrimPrefix(err.Error(), "toml: "))
}

// finish validates what the files have set and returns all errors joined.
func (l *loader) finish() error {
	for _, r := range l.rules {
		where, ok := l.origin[r.key]
		if !ok {
			continue
		}
		if problem := r.problem(&l.config); problem != "" {
			l.errs = append(l.errs, fmt.Errorf("%s: %s", where, problem))
		}
	}
	return errors.Join(l.errs...)
}

// A document is one file being read.
type document struct {
	*loader
	file   string
	parser *unstable.Parser
}

// table reports whether e opens a section that exists.
func (d *document) table(e *unstable.Node, path []string) bool {
	name := strings.Join(path, ".")
	switch {
	case !d.isSection(name):
		d.fail(e, "[%s]: unknown table; the tables are [%s]", name, strings.Join(d.sections(), "], ["))
	case e.Kind == unstable.ArrayTable:
		d.fail(e, "[[%s]]: want a single table; write [%s]", name, name)
	default:
		return true
	}
	return false
}

// keyValue decodes one key, or an inline table of keys.
func (d *document) keyValue(e *unstable.Node, section []string) {
	path := slices.Concat(section, key(e))
	name := strings.Join(path, ".")
	_, raw, _ := bytes.Cut(d.parser.Raw(e.Raw), []byte("="))
	if d.isSection(name) {
		if e.Value().Kind != unstable.InlineTable {
			d.fail(e, "%s = %s: want a table; write [%s]", name, abridge(raw), name)
			return
		}
		for it := e.Value().Children(); it.Next(); {
			d.keyValue(it.Node(), path)
		}
		return
	}
	r, ok := d.rule(name)
	if !ok {
		d.fail(e, "%s: unknown key%s", name, d.hint(name))
		return
	}
	table, last, _ := strings.Cut(name, ".")
	alone := fmt.Sprintf("[%s]\n%s = %s", table, last, raw)
	if err := toml.NewDecoder(strings.NewReader(alone)).DisallowUnknownFields().Decode(&d.config); err != nil {
		d.fail(e, "%s", r.refuse(abridge(raw)))
		delete(d.origin, name)
		return
	}
	d.origin[name] = d.where(e)
}

func (d *document) fail(e *unstable.Node, format string, args ...any) {
	d.errs = append(d.errs, fmt.Errorf("%s: %s", d.where(e), fmt.Sprintf(format, args...)))
}

// where returns file:line of an expression's key.
func (d *document) where(e *unstable.Node) string {
	it := e.Key()
	it.Next()
	return fmt.Sprintf("%s:%d", d.file, d.parser.Shape(it.Node().Raw).Start.Line)
}

func (l *loader) rule(key string) (rule, bool) {
	i := slices.IndexFunc(l.rules, func(r rule) bool { return r.key == key })
	if i < 0 {
		return rule{}, false
	}
	return l.rules[i], true
}

func (l *loader) sections() []string {
	var names []string
	for _, r := range l.rules {
		name, _, _ := strings.Cut(r.key, ".")
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func (l *loader) isSection(name string) bool { return slices.Contains(l.sections(), name) }

// hint names the known key nearest to an unknown one, if one is near.
func (l *loader) hint(name string) string {
	section, last, _ := strings.Cut(name, ".")
	near, least := "", max(2, len(last)/3)+1
	for _, r := range l.rules {
		s, k, _ := strings.Cut(r.key, ".")
		n := distance(k, last)
		if s != section {
			n++
		}
		if n < least {
			near, least = r.key, n
		}
	}
	if near == "" {
		return ""
	}
	return "; did you mean " + near + "?"
}

// distance is Levenshtein's: the fewest single-byte edits from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			edit := diagonal
			if a[i] != b[j] {
				edit++
			}
			diagonal = row[j+1]
			row[j+1] = min(edit, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// key returns the parts of an expression's key.
func key(e *unstable.Node) []string {
	var parts []string
	for it := e.Key(); it.Next(); {
		parts = append(parts, string(it.Node().Data))
	}
	return parts
}

// abridge makes one short line of a value as it is written in the file.
func abridge(raw []byte) string {
	const most = 60
	s := []rune(strings.Join(strings.Fields(string(raw)), " "))
	if len(s) > most {
		s = append(s[:most], '…')
	}
	return string(s)
}
