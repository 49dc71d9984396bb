package refusal

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestTextIsOnePrintableLineOfBoundedLength(t *testing.T) {
	for in, want := range map[string]string{
		"create container \"c\": no": "create container \"c\": no",
		"two\nlines\x1b[2J\u2028":    "two lines [2J ",
		"":                           "",
	} {
		if got := New(errors.New(in)).Error(); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
	long := New(errors.New(strings.Repeat("ö", 1<<20))).Error()
	if len(long) > maxText+3 || !strings.HasSuffix(long, "ö...") {
		t.Errorf("a long text became %d bytes that end in %q", len(long), long[len(long)-8:])
	}
}

func TestDuringDoesNotRepeatTheAgent(t *testing.T) {
	said := fmt.Errorf("and: %w", New(fmt.Errorf("start container: no: %w", errdefs.ErrNotFound)))
	if got := During(said, "start"); got != said || !errdefs.IsNotFound(got) {
		t.Errorf("During of the agent's word: %v", got)
	}
	if got := During(errdefs.ErrUnavailable, "start %d", 1); got.Error() != "start 1: unavailable" {
		t.Errorf("During of another error: %v", got)
	}
	if During(nil, "start") != nil {
		t.Error("During of no error is one")
	}
}
