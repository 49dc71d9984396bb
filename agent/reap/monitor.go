package reap

import (
	"os/exec"

	runc "github.com/containerd/go-runc"
)

// Monitor returns t as what go-runc starts an OCI runtime's commands through.
func (t *Table) Monitor() runc.ProcessMonitor { return monitor{t} }

type monitor struct{ t *Table }

// Start implements runc.ProcessMonitor.
func (m monitor) Start(cmd *exec.Cmd) (chan runc.Exit, error) {
	p, err := m.t.Start(cmd)
	if err != nil {
		return nil, err
	}
	ch := make(chan runc.Exit, 1)
	go func() { // ends with the process
		<-p.Done()
		ch <- runc.Exit{Timestamp: p.exit.At, Pid: p.pid, Status: p.exit.Status}
		close(ch)
	}()
	return ch, nil
}

// StartLocked implements runc.ProcessMonitor. It is for a parent-death signal,
// which PID 1 has no use for.
func (m monitor) StartLocked(cmd *exec.Cmd) (chan runc.Exit, error) { return m.Start(cmd) }

// Wait implements runc.ProcessMonitor.
func (m monitor) Wait(_ *exec.Cmd, ch chan runc.Exit) (int, error) { return (<-ch).Status, nil }
