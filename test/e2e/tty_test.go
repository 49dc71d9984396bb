package e2e

import (
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/console"

	"github.com/husk-containers/husk/test/images"
)

// A terminal is the master of a pseudo-terminal whose slave a ctr has as its
// controlling terminal.
type terminal struct {
	*command
	master console.Console
}

// startTTY runs ctr on a terminal of 40 rows and 120 columns.
func (e *env) startTTY(args ...string) *terminal {
	e.Helper()
	master, path, err := console.NewPty()
	if err != nil {
		e.Fatal(err)
	}
	if err := master.Resize(console.WinSize{Height: 40, Width: 120}); err != nil {
		e.Fatal(err)
	}
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		e.Fatal(err)
	}
	defer slave.Close()
	t := &terminal{command: e.prepare(args...), master: master}
	t.drained = make(chan struct{})
	t.cmd.Stdin, t.cmd.Stdout, t.cmd.Stderr = slave, slave, slave
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	t.launch()
	go func() { // ends when the last slave is closed, with ctr
		defer close(t.drained)
		io.Copy(&t.stdout, master)
	}()
	return t
}

// wait is command's, with all of the output.
func (t *terminal) wait() result {
	t.e.Helper()
	defer t.master.Close()
	r := t.command.wait()
	<-t.drained
	r.stdout = t.stdout.String()
	return r
}

func (t *terminal) write(text string) {
	t.e.Helper()
	if _, err := t.master.Write([]byte(text)); err != nil {
		t.e.Fatal(err)
	}
}

// sizes prints the terminal's size now and whenever it changes.
const sizes = `trap 'stty size' WINCH; stty size; sleep 1000 & while :; do wait; done`

func TestTTY(t *testing.T) {
	each(t, func(e *env) {
		args := e.runArgs("--rm", "--tty", images.Busybox, e.d.ID("tty"), "sh", "-c",
			"test -t 0 && test -t 1 && test -t 2 && echo all terminals; read -r line; echo \"got $line\"; exit 5")
		c := e.startTTY(args...)
		c.expect("all terminals")
		c.write("hello\r")
		if r := c.wait(); r.code != 5 || !strings.Contains(r.stdout, "got hello") {
			e.Errorf("%v", r)
		}
	})
}

func TestTTYHasTheSizeAndFollowsIt(t *testing.T) {
	each(t, func(e *env) {
		c := e.startTTY(e.runArgs("--rm", "--tty", images.Busybox, e.d.ID("tty"), "sh", "-c", sizes)...)
		c.expect("40 120")
		if err := c.master.Resize(console.WinSize{Height: 30, Width: 100}); err != nil {
			e.Fatal(err)
		}
		c.expect("30 100")
		e.must("task", "kill", "--signal", "SIGKILL", e.d.ID("tty"))
		if r := c.wait(); r.code != 137 {
			e.Errorf("%v, want exit code 137", r)
		}
	})
}

func TestTTYInterruptAndEnd(t *testing.T) {
	each(t, func(e *env) {
		c := e.startTTY(e.runArgs("--rm", "--tty", images.Busybox, e.d.ID("tty"), "sh", "-c",
			"trap 'echo interrupted' INT; sh -c 'echo ready; exec cat'; read -r line || echo end of input")...)
		c.expect("ready")
		c.write("\x03")
		c.expect("interrupted")
		c.write("\x04")
		c.expect("end of input")
		if r := c.wait(); r.code != 0 {
			e.Errorf("%v", r)
		}
	})
}

func TestExecTTY(t *testing.T) {
	each(t, func(e *env) {
		id := e.detached("exec", "sleep 1000")
		c := e.startTTY("task", "exec", "--tty", "--exec-id", "tty", "--fifo-dir", e.d.FIFODir(), id, "sh", "-c", sizes)
		c.expect("40 120")
		e.must("task", "kill", "--exec-id", "tty", "--signal", "SIGKILL", id)
		if r := c.wait(); r.code != 137 {
			e.Errorf("%v, want exit code 137", r)
		}
	})
}
