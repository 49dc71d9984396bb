package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// An event is one line of `go test -json`.
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output and build-fail
	Test       string
	Output     string
	Elapsed    float64 // seconds
}

// A report gathers the events of one part. A test that has subtests is not
// counted: they are.
type report struct {
	part    string
	w       io.Writer
	verbose bool
	took    time.Duration

	passed, failed, skipped int
	reasons                 []string // why tests were skipped, one each
	omitted                 string   // why the whole part was, if it was
	failures                []string // names

	output  map[string][]string // by package and test, until its end
	parents map[string]bool     // tests that have subtests
	broken  map[string]bool     // packages with a failed test
}

func newReport(part string, w io.Writer, verbose bool) *report {
	return &report{
		part: part, w: w, verbose: verbose,
		output: map[string][]string{}, parents: map[string]bool{}, broken: map[string]bool{},
	}
}

// read takes in events up to the end. Lines that are none are printed.
func (r *report) read(in *bufio.Reader) error {
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
				fmt.Fprint(r.w, line)
			} else {
				r.add(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read test events: %w", err)
		}
	}
}

func (r *report) add(e event) {
	name := e.Package + " " + e.Test
	if e.Package == "" { // of a build
		name = e.ImportPath + " "
	}
	switch e.Action {
	case "run":
		// A name may have more than one level where no test is between.
		for i, c := range e.Test {
			if c == '/' {
				r.parents[e.Package+" "+e.Test[:i]] = true
			}
		}
	case "output", "build-output":
		r.output[name] = append(r.output[name], e.Output)
	case "pass", "skip", "fail":
		r.end(e, name)
		delete(r.output, name)
	}
}

func (r *report) end(e event, name string) {
	counted := e.Test != "" && !r.parents[name]
	switch {
	case e.Action == "fail" && e.Test == "" && !r.broken[e.Package]:
		// No test of it failed: it did not build, or its TestMain, or it panicked.
		r.failure(e, name, append(r.output[e.Package+" "], r.buildOutput(e.Package)...))
	case e.Action == "fail" && e.Test != "":
		r.broken[e.Package] = true
		if counted || r.ownOutput(name) {
			r.failure(e, name, r.output[name])
		}
	case e.Action == "skip" && counted:
		r.skipped++
		r.reasons = append(r.reasons, fmt.Sprintf("%s: %s", short(name), reason(r.output[name])))
	case e.Action == "pass" && counted:
		r.passed++
		if r.verbose {
			fmt.Fprintf(r.w, "pass %s (%.1fs)\n", short(name), e.Elapsed)
		}
	case e.Action == "pass" && e.Test == "":
		fmt.Fprintf(r.w, "ok   %s (%.1fs)\n", e.Package, e.Elapsed)
	}
}

// ownOutput is whether a test that has subtests said something itself.
func (r *report) ownOutput(name string) bool {
	return slices.ContainsFunc(r.output[name], func(line string) bool { return !isFrame(line) })
}

func (r *report) failure(e event, name string, output []string) {
	r.failed++
	r.failures = append(r.failures, short(name))
	fmt.Fprintf(r.w, "FAIL %s (%.1fs)\n", short(name), e.Elapsed)
	for _, line := range output {
		if !isFrame(line) {
			fmt.Fprintf(r.w, "     %s\n", strings.TrimRight(line, "\n"))
		}
	}
}

// buildOutput is the compiler's, of a package or of its test.
func (r *report) buildOutput(pkg string) []string {
	var lines []string
	for name, output := range r.output {
		if strings.HasPrefix(name, pkg+" [") {
			lines = append(lines, output...)
		}
	}
	return lines
}

// fail counts a part that did not run to its end.
func (r *report) fail(err error) {
	r.failed++
	r.failures = append(r.failures, r.part+" as a whole")
	fmt.Fprintf(r.w, "FAIL %s: %v\n", r.part, err)
}

// omit skips the part as a whole.
func (r *report) omit(why string) {
	r.skipped++
	r.omitted = why
	r.reasons = append(r.reasons, r.part+" as a whole: "+why)
}

// isFrame is whether go test itself wrote a line.
func isFrame(line string) bool {
	line = strings.TrimSpace(line)
	for _, prefix := range []string{"=== ", "--- ", "PASS", "FAIL", "exit status"} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return line == ""
}

// reason is the last thing that a skipped test said, without its place.
func reason(output []string) string {
	said := "no reason given"
	for _, line := range output {
		if !isFrame(line) {
			said = strings.TrimSpace(line)
		}
	}
	if _, text, ok := strings.Cut(said, ": "); ok && strings.Contains(said, "_test.go:") {
		return text
	}
	return said
}

// short is a test's name with the last element of its package's path.
func short(name string) string {
	pkg, test, _ := strings.Cut(name, " ")
	if pkg = pkg[strings.LastIndexByte(pkg, '/')+1:]; test == "" {
		return pkg
	}
	return pkg + "." + test
}

// summarize prints the end of a run and returns the exit code.
func summarize(w io.Writer, reports []*report) int {
	passed, failed, skipped := 0, 0, 0
	fmt.Fprintln(w, "\n== summary")
	for _, r := range reports {
		passed, failed, skipped = passed+r.passed, failed+r.failed, skipped+r.skipped
		fmt.Fprintf(w, "%-5s %4d passed %4d failed %4d skipped  %s\n", r.part, r.passed, r.failed, r.skipped, r.took.Round(time.Second))
		for _, name := range r.failures {
			fmt.Fprintf(w, "      failed  %s\n", name)
		}
		for _, why := range r.reasons {
			fmt.Fprintf(w, "      skipped %s\n", why)
		}
	}
	if passed+failed == 0 {
		fmt.Fprintln(w, "no test ran")
		failed++
	}
	fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if failed > 0 {
		return 1
	}
	return 0
}
