package main

import (
	"fmt"
	"strings"
)

const preamble = "<!-- Generated from configuration.toml by `go generate ./config`. Edit that file. -->\n\n# Configuration\n"

// render makes the Markdown page of an annotated configuration file: a block of
// comments is about the table or key below it, or at the top about the file. A
// line "Allowed: ..." of a key's block is what the key allows.
func render(toml string) (string, error) {
	var page strings.Builder
	page.WriteString(preamble)
	var block []string
	for i, line := range strings.Split(strings.TrimSuffix(toml, "\n"), "\n") {
		comment, isComment := strings.CutPrefix(line, "#")
		key, value, isKey := strings.Cut(line, " = ")
		switch {
		case isComment:
			block = append(block, strings.TrimPrefix(comment, " "))
			continue
		case strings.HasPrefix(line, "["):
			fmt.Fprintf(&page, "\n## %s\n\n%s\n", line, prose(block))
		case isKey:
			text, allowed, ok := strings.Cut(prose(block), "\nAllowed: ")
			if !ok {
				return "", fmt.Errorf("configuration.toml:%d: no line %q above %s", i+1, "# Allowed: ...", key)
			}
			fmt.Fprintf(&page, "\n### %s\n\n%s\n\n- Default: `%s`\n- Allowed: %s\n", key, text, value, allowed)
		case line != "":
			return "", fmt.Errorf("configuration.toml:%d: neither comment, table nor key: %q", i+1, line)
		case len(block) > 0: // the head: comments above an empty line
			fmt.Fprintf(&page, "\n%s\n", prose(block))
		}
		block = nil
	}
	return page.String(), nil
}

func prose(block []string) string { return code(strings.Join(block, "\n")) }

// code sets quoted words as code, and placeholders that Markdown would take for
// emphasis.
func code(s string) string {
	var out strings.Builder
	for i, part := range strings.Split(s, `"`) {
		switch {
		case i%2 == 1:
			fmt.Fprintf(&out, "`\"%s\"`", part)
		default:
			out.WriteString(strings.ReplaceAll(part, "*", `\*`))
		}
	}
	return out.String()
}
