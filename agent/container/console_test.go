package container

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestConsoleSocket(t *testing.T) {
	s, err := listenConsole(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("no terminal can be made: ", err)
	}
	conn, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte("/dev/pts/0"), unix.UnixRights(master), nil); err != nil {
		t.Fatal(err)
	}
	unix.Close(master)
	conn.Close()
	console, err := s.receive(100, 30)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	raw, err := console.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		size, err := unix.IoctlGetWinsize(int(fd), unix.TIOCGWINSZ)
		if err != nil || size.Col != 100 || size.Row != 30 {
			t.Errorf("size %v, %v", size, err)
		}
	})
}

func TestConsoleSocketWithoutDescriptor(t *testing.T) {
	s, err := listenConsole(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.receive(0, 0); err == nil || !strings.Contains(err.Error(), "receive console") {
		t.Errorf("got %v", err)
	}
	s.Close()
	if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
		t.Errorf("directory is left: %v", err)
	}
}
