package agenttest

import (
	"fmt"
	"os"
	"sync"
	"time"
)

// A Platform does nothing to the machine and remembers what it was told. The
// zero value is ready.
type Platform struct {
	// Sysctls that there are; nil: any.
	Sysctls map[string]bool

	mu    sync.Mutex
	calls []string
}

// Calls returns what was asked for, in order, such as `hostname "pod"`.
func (p *Platform) Calls() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string{}, p.calls...)
}

func (p *Platform) add(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, fmt.Sprintf(format, args...))
}

// SetHostname implements agent.Platform.
func (p *Platform) SetHostname(name string) error {
	p.add("hostname %q", name)
	return nil
}

// SetClock implements agent.Platform.
func (p *Platform) SetClock(t time.Time) error {
	p.add("clock %d", t.UnixNano())
	return nil
}

// AddEntropy implements agent.Platform.
func (p *Platform) AddEntropy(b []byte) error {
	p.add("entropy %d", len(b))
	return nil
}

// SetSysctl implements agent.Platform.
func (p *Platform) SetSysctl(key, value string) error {
	if p.Sysctls != nil && !p.Sysctls[key] {
		return fmt.Errorf("set sysctl %s: %w", key, os.ErrNotExist)
	}
	p.add("sysctl %s=%s", key, value)
	return nil
}

// MountVirtioFS implements agent.Platform.
func (p *Platform) MountVirtioFS(tag, target string, readOnly bool) error {
	p.add("mount %s on %s readonly=%t", tag, target, readOnly)
	return nil
}

// Sync implements agent.Platform.
func (p *Platform) Sync(time.Duration) { p.add("sync") }
