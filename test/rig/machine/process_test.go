package machine

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

func TestRunReportsExitCodeAndStderr(t *testing.T) {
	if err := run(t.Context(), command{path: "/bin/sh", args: []string{"-c", `test "$KEY" = value`}, env: []string{"KEY=value"}}); err != nil {
		t.Error(err)
	}
	err := run(t.Context(), command{path: "/bin/sh", args: []string{"-c", "echo why >&2; exit 3"}})
	const want = "run sh: exit status 3\n  | why"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestRunKillsWithItsContext(t *testing.T) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := run(ctx, command{path: "/bin/sleep", args: []string{"1000"}}); !errors.Is(err, cause) {
		t.Errorf("error %v, want %v", err, cause)
	}
}

func TestStartReportsWhatPrepareSays(t *testing.T) {
	cause := errors.New("not today")
	if _, err := start(command{path: "/bin/true", prepare: func() error { return cause }}); !errors.Is(err, cause) {
		t.Errorf("error %v, want %v", err, cause)
	}
	if _, err := start(command{path: "/nonexistent"}); err == nil {
		t.Error("a program that is not there was started")
	}
}

func TestVhostUserSocket(t *testing.T) {
	listenerFile, clientFile, err := vhostUserSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer listenerFile.Close()
	listener, err := net.FileListener(listenerFile)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := clientFile.WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	clientFile.Close()
	if got, err := io.ReadAll(server); string(got) != "hello" || err != nil {
		t.Errorf("server read %q, %v", got, err)
	}
}

func TestShareArguments(t *testing.T) {
	for _, test := range []struct {
		share share
		want  string
	}{
		{share{dir: "/", readOnly: true}, "-o source=/ -o cache=always -o sandbox=chroot"},
		{share{dir: "/results"}, "-o source=/results -o cache=auto -o sandbox=chroot"},
	} {
		args, err := test.share.arguments()
		if got := strings.Join(args[2:], " "); got != test.want || err != nil {
			t.Errorf("arguments of %+v: %s, %v, want %s", test.share, got, err, test.want)
		}
	}
}
