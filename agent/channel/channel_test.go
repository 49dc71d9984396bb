package channel

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestOpenParam(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, param := range []string{"", "vsock", "vsock:", "vsock:-1", "vsock:4294967296", "vsock:1 ", "serial"} {
		if _, err := Open(ctx, param); err == nil {
			t.Errorf("opened %q", param)
		}
	}
	c, err := Open(ctx, "vsock:4294967295")
	if err != nil {
		t.Fatal(err)
	}
	v, ok := c.carrier.(*vsockCarrier)
	if !ok || v.host != 2 || v.port != 4294967295 {
		t.Errorf("got %+v", c.carrier)
	}
}

func TestScanPorts(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ port, name, want string }{
		{"", "", ""},
		{"vport0p1", "org.example\n", ""},
		{"vport1p2", "husk.channel2\n", ""},
		{"vport1p3", "husk.channel\n", "/dev/vport1p3"},
	} {
		if c.port != "" {
			if err := os.Mkdir(filepath.Join(dir, c.port), 0o755); err != nil {
				t.Fatal(err)
			}
			if got, err := scanPorts(dir); got != "" || err != nil {
				t.Errorf("port without a name: %q, %v", got, err)
			}
			if err := os.WriteFile(filepath.Join(dir, c.port, "name"), []byte(c.name), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := scanPorts(dir); got != c.want || err != nil {
			t.Errorf("after %s: %q, %v; want %q", c.port, got, err, c.want)
		}
	}
}

func TestFindPortEndsWithContext(t *testing.T) {
	why := errors.New("given up")
	ctx, cancel := context.WithCancelCause(context.Background())
	found := make(chan error, 1)
	go func() {
		_, err := findPort(ctx)
		found <- err
	}()
	cancel(why)
	if err := <-found; !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

// A pipe behaves as a port does whose host is there.
func TestAwaitHost(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := awaitHost(context.Background(), w); err != nil {
		t.Error(err)
	}
}

func TestSerialWithoutHost(t *testing.T) {
	why := errors.New("no such port")
	c := NewSerial(func(context.Context) (io.ReadWriteCloser, error) { return nil, why })
	defer c.Close()
	if _, err := c.DialControl(context.Background()); !errors.Is(err, why) {
		t.Errorf("DialControl: %v", err)
	}
	if _, err := c.Listen(1); !errors.Is(err, why) {
		t.Errorf("Listen: %v", err)
	}
}

func TestSerialClose(t *testing.T) {
	c := NewSerial(func(ctx context.Context) (io.ReadWriteCloser, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	l, err := c.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 2)
	go func() {
		_, err := l.Accept()
		errs <- err
	}()
	go func() {
		_, err := c.DialControl(context.Background())
		errs <- err
	}()
	c.Close()
	for range 2 {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
	if _, err := c.Listen(2); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listen: %v", err)
	}
	c.Close()
}
