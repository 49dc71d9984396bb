package main

import (
	"bufio"
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestReport reads recorded events of go test: all that can happen to a test.
func TestReport(t *testing.T) {
	events, err := os.ReadFile("testdata/events.json")
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	r := newReport("unit", &got, true)
	if err := r.read(bufio.NewReader(bytes.NewReader(events))); err != nil {
		t.Fatal(err)
	}
	left := newReport("rig", &got, true)
	left.omit("needs root")
	if code := summarize(&got, []*report{r, left}); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	golden := filepath.Join("testdata", "report.txt")
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("report:\n%s\nwant:\n%s", &got, want)
	}
}

func TestSummaryOfNothingIsAFailure(t *testing.T) {
	var got strings.Builder
	if code := summarize(&got, nil); code != 1 || !strings.HasSuffix(got.String(), "\n0 passed, 1 failed, 0 skipped\n") {
		t.Errorf("exit code %d, output %q", code, got.String())
	}
}
