package qemu

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/husk-containers/husk/hypervisor"
)

const (
	// consoleLines and consoleLine bound what is kept of the guest's console:
	// the guest writes it, so it is limited, and escaped before anyone sees it.
	consoleLines = 12
	consoleLine  = 240
	// panicMark is how Linux begins the line (kernel/panic.c).
	panicMark = "Kernel panic - not syncing: "
)

// A console keeps the last lines that the guest wrote to its serial port.
type console struct {
	mu    sync.Mutex
	lines []string
	line  []byte
	// panicked is the line in which the guest's kernel told of its end. The
	// backtrace that follows is longer than what is kept.
	panicked string
	done     chan struct{}
}

// newConsole reads r until it ends.
func newConsole(r io.Reader) *console {
	c := &console{done: make(chan struct{})}
	go func() {
		defer close(c.done)
		io.Copy(c, r) //nolint:errcheck // it ends with the VM
	}()
	return c
}

// Write implements io.Writer; it never fails.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range p {
		switch {
		case b == '\n':
			c.flush()
		case len(c.line) < consoleLine:
			c.line = append(c.line, b)
		}
	}
	return len(p), nil
}

func (c *console) flush() {
	if text := printable(c.line); text != "" {
		if i := strings.Index(text, panicMark); i >= 0 && c.panicked == "" {
			c.panicked = text[i+len(panicMark):]
		}
		c.lines = append(c.lines, text)
		if len(c.lines) > consoleLines {
			c.lines = c.lines[1:]
		}
	}
	c.line = c.line[:0]
}

// tail returns the last lines in one line, oldest first; empty if there were none.
func (c *console) tail() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := c.lines
	if text := printable(c.line); text != "" {
		lines = append(lines[:len(lines):len(lines)], text)
	}
	return strings.Join(lines, " | ")
}

// panicLine returns what the guest's kernel gave as the reason of its panic;
// empty if it did not panic.
func (c *console) panicLine() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.panicked
}

// oomPanics are the reasons of a panic for want of memory (mm/oom_kill.c): nothing is left
// to kill, or the kernel was told not to kill.
var oomPanics = []string{"System is deadlocked on memory", "Out of memory: "}

// panicCause returns why the guest's kernel panicked, an ErrGuestOOM where that is why;
// nil if it did not.
func (c *console) panicCause() error {
	reason := c.panicLine()
	if reason == "" {
		return nil
	}
	for _, oom := range oomPanics {
		if strings.HasPrefix(reason, oom) {
			return fmt.Errorf("%w: its kernel has panicked: %s", hypervisor.ErrGuestOOM, reason)
		}
	}
	return fmt.Errorf("the guest's kernel has panicked: %s", reason)
}

// printable drops terminal control sequences and escapes every other character
// that is not printable.
func printable(line []byte) string {
	var b strings.Builder
	for i := 0; i < len(line); {
		r, n := utf8.DecodeRune(line[i:])
		if skip := controlSequence(line[i:]); skip > 0 {
			i += skip
			continue
		}
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, line[i])
		case r == '\r':
		case r == '\t':
			b.WriteByte(' ')
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		i += n
	}
	return strings.TrimSpace(b.String())
}

// controlSequence returns the length of the ECMA-48 control sequence that b
// begins with, or 0.
func controlSequence(b []byte) int {
	if len(b) < 2 || b[0] != 0x1b {
		return 0
	}
	if b[1] != '[' {
		return 2
	}
	for i := 2; i < len(b); i++ {
		if b[i] >= 0x40 && b[i] <= 0x7e {
			return i + 1
		}
	}
	return len(b)
}
