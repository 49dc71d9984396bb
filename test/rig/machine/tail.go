package machine

import (
	"strings"
	"sync"
	"unicode"
)

// tailBytes bounds what a tail keeps.
const tailBytes = 8 << 10

// A tail is a writer that keeps the end of what was written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

// quote returns the last n lines for the end of an error: each on a line of its
// own, indented, without control characters. It is empty where there are none.
func (t *tail) quote(n int) string {
	t.mu.Lock()
	text := string(t.buf)
	t.mu.Unlock()
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(strings.Map(func(r rune) rune {
			if unicode.IsControl(r) || r == unicode.ReplacementChar {
				return -1
			}
			return r
		}, line))
		if line != "" {
			lines = append(lines, "\n  | "+line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}
