package qemu

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode"

	"github.com/husk-containers/husk/hypervisor"
)

func write(c *console, s string) { c.Write([]byte(s)) } //nolint:errcheck // never fails

func TestConsoleKeepsTheLastLinesEscaped(t *testing.T) {
	c := &console{}
	for range 100 {
		write(c, "earlier\n")
	}
	write(c, "\x1b[2J\x1b[31mred\x1b[0m\r\n\n  \na\x00b\xff\tc\nunfinished")
	want := strings.Repeat("earlier | ", consoleLines-2) + `red | a\u0000b\xff c | unfinished`
	if got := c.tail(); got != want {
		t.Errorf("tail %q, want %q", got, want)
	}
}

func TestConsoleFindsThePanic(t *testing.T) {
	c := &console{}
	write(c, "[    1.0] Kernel panic - not syncing: No working init found.\n[    1.1] ---[ end Kernel panic - not syncing ]---\n")
	write(c, strings.Repeat("a long backtrace\n", 50))
	if got, want := c.panicLine(), "No working init found."; got != want {
		t.Errorf("panic line %q, want %q", got, want)
	}
	if got := (&console{}).panicLine(); got != "" {
		t.Errorf("panic line of a silent console: %q", got)
	}
}

func FuzzConsole(f *testing.F) {
	for _, s := range []string{"", "ok\n", "\x1b[", "\x1b[1;2mX\n", "\xf0\x28\n", "Kernel panic - x\n", strings.Repeat("x", 1000)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &console{}
		c.Write(b) //nolint:errcheck // never fails
		got := c.tail() + c.panicLine()
		// An escape is at most six characters for one byte.
		if limit := 2 * (consoleLines + 1) * (6*consoleLine + 3); len(got) > limit {
			t.Errorf("%d bytes kept, limit %d", len(got), limit)
		}
		if i := strings.IndexFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("unprintable character in %q", got)
		}
	})
}

// As Linux 6.1 prints them.
func TestPanicCause(t *testing.T) {
	for text, want := range map[string]string{
		"": "<nil>",
		"[   21.5] Out of memory and no killable processes...\n[   21.5] Kernel panic - not syncing: System is deadlocked on memory\n": "the guest ran out of memory: its kernel has panicked: System is deadlocked on memory",
		"[   21.5] Kernel panic - not syncing: Out of memory: compulsory panic_on_oom is enabled\n":                                    "the guest ran out of memory: its kernel has panicked: Out of memory: compulsory panic_on_oom is enabled",
		"[   21.5] Kernel panic - not syncing: Fatal exception\n":                                                                      "the guest's kernel has panicked: Fatal exception",
		"Out of memory: Killed process 7 (dd)\n":                                                                                       "<nil>",
	} {
		c := newConsole(strings.NewReader(text))
		<-c.done
		err := c.panicCause()
		if got := fmt.Sprint(err); got != want || errors.Is(err, hypervisor.ErrGuestOOM) != strings.Contains(want, "out of memory") {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
