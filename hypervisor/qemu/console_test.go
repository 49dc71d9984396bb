package qemu

import (
	"strings"
	"testing"
	"unicode"
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
