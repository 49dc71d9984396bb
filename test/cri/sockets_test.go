package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/husk-containers/husk/test/daemon"
)

// clientDir is where containers have sockclient.
const clientDir = "/client"

// sockClient builds sockclient and returns the directory that it is alone in.
func (e *env) sockClient() (dir string) {
	e.Helper()
	dir = filepath.Join(e.d.Dir, "client")
	build := exec.CommandContext(e.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "./sockclient")
	build.Dir = filepath.Join(repository(e.T), "test", "cri")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		e.Fatalf("build sockclient: %v\n%s", err, out)
	}
	return dir
}

// withSockets is an edit that gives a container the client, and mounts, each as host
// path and path in the container.
func withSockets(client string, mounts ...string) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) {
		c.Mounts = append(c.Mounts, &runtime.Mount{HostPath: client, ContainerPath: clientDir, Readonly: true})
		for i := 0; i < len(mounts); i += 2 {
			c.Mounts = append(c.Mounts, &runtime.Mount{HostPath: mounts[i], ContainerPath: mounts[i+1]})
		}
	}
}

// asUser is an edit.
func asUser(uid, gid int64) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: uid}, &runtime.Int64Value{Value: gid}
	}
}

// A hostSocket is a server of the host on a unix socket, for every user.
type hostSocket struct {
	e    *env
	path string
	ln   *net.UnixListener
	work sync.WaitGroup
}

// listen has each connection to a socket of the host handled, and then closed.
func (e *env) listen(path string, handle func(*net.UnixConn)) *hostSocket {
	e.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		e.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		e.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		e.Fatal(err)
	}
	s := &hostSocket{e: e, path: path, ln: ln}
	s.work.Go(func() {
		for {
			conn, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			s.work.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	e.Cleanup(s.close)
	return s
}

// close ends the server, which takes its socket away.
func (s *hostSocket) close() {
	s.ln.Close()
	s.work.Wait()
}

// echo answers, after its name, with what it was sent, once that has come.
func echo(name string) func(*net.UnixConn) {
	return func(conn *net.UnixConn) {
		b, err := io.ReadAll(conn)
		if err == nil {
			conn.Write(append([]byte(name), b...))
		}
	}
}

// A pod mounts a socket of the host.
func TestSocketOfTheHost(t *testing.T) {
	each(t, setup{}, func(e *env) {
		client, path := e.sockClient(), filepath.Join(e.d.Dir, "s", "echo.sock")
		e.listen(path, echo(""))
		p := e.run("sockets")
		c := p.start("c", idle, withSockets(client, path, "/run/host/echo.sock"), asUser(1234, 2345))
		c.want(clientDir+"/sockclient ask /run/host/echo.sock hello", "hello")
		c.want("test -S /run/host/echo.sock && stat -c %a /run/host/echo.sock", "777")
		count := 500
		if *longFlag {
			count = 10000
		}
		c.sh(fmt.Sprintf("%s/sockclient many /run/host/echo.sock %d 8", clientDir, count))
		c.sh(clientDir + "/sockclient many /run/host/echo.sock 20 1000000")
		// The same for another container, and after its end.
		d := p.start("d", idle, withSockets(client, path, "/x.sock"))
		d.want(clientDir+"/sockclient ask /x.sock hello", "hello")
		d.stop()
		d.remove()
		c.want(clientDir+"/sockclient ask /run/host/echo.sock again", "again")
		p.remove()
		e.settled()
	})
}

// Whoever closes first, the other end hears of it.
func TestEndsOfASocketsConnection(t *testing.T) {
	each(t, setup{}, func(e *env) {
		client, path := e.sockClient(), filepath.Join(e.d.Dir, "s", "end.sock")
		gone := make(chan string, 1)
		e.listen(path, func(conn *net.UnixConn) {
			io.WriteString(conn, "hello\n")
			b, err := io.ReadAll(conn)
			if err != nil {
				b = append(b, err.Error()...)
			}
			gone <- string(b)
		})
		p := e.run("ends")
		c := p.start("c", clientDir+"/sockclient hold /s; echo ended", withSockets(client, path, "/s"))
		c.waitOutput("hello")
		c.stop() // killed
		if got := <-gone; got != "" {
			e.Errorf("the server reads %q of a client that has gone", got)
		}
		bye := e.listen(filepath.Join(e.d.Dir, "s", "bye.sock"), func(conn *net.UnixConn) { io.WriteString(conn, "bye\n") })
		d := p.start("d", clientDir+"/sockclient hold /s && echo ended", withSockets(client, bye.path, "/s"))
		d.waitOutput("bye\nended")
		p.remove()
		e.settled()
	})
}

// A pod mounts a directory in which sockets come and go.
func TestDirectoryOfSockets(t *testing.T) {
	each(t, setup{}, func(e *env) {
		client, dir := e.sockClient(), filepath.Join(e.d.Dir, "dir")
		first := e.listen(filepath.Join(dir, "first.sock"), echo("first "))
		e.listen(filepath.Join(dir, "sub", "deep.sock"), echo("deep "))
		p := e.run("directory")
		c := p.start("c", idle, withSockets(client, dir, "/sockets"), asUser(1234, 2345))
		ask := func(name string) string { return fmt.Sprintf("%s/sockclient ask /sockets/%s hello", clientDir, name) }
		answers := func(name, want string) {
			e.Helper()
			e.eventually(name+" answers "+want, func(context.Context) error {
				if r := c.exec(ask(name)); strings.TrimSpace(r.stdout) != want {
					return fmt.Errorf("%v", r)
				}
				return nil
			})
		}
		c.want(ask("first.sock"), "first hello")
		c.want(ask("sub/deep.sock"), "deep hello")

		e.listen(filepath.Join(dir, "later.sock"), echo("later "))
		answers("later.sock", "later hello")
		e.listen(filepath.Join(dir, "new", "below.sock"), echo("below "))
		answers("new/below.sock", "below hello")

		for i := range 5 { // the server is restarted
			first.close()
			name := fmt.Sprintf("restarted %d ", i)
			first = e.listen(filepath.Join(dir, "first.sock"), echo(name))
			answers("first.sock", name+"hello")
		}
		first.close()
		e.eventually("the socket is gone", func(context.Context) error {
			if r := c.exec("test -e /sockets/first.sock"); r.code == 0 {
				return errors.New("it is still there")
			}
			return nil
		})
		c.want(ask("later.sock"), "later hello")
		p.remove()
		e.settled()
	})
}

// A server that is restarted is found again, though its socket is another file.
func TestSocketOfARestartedServer(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) { // runc's bind stays with the first file
		client, path := e.sockClient(), filepath.Join(e.d.Dir, "s", "echo.sock")
		s := e.listen(path, echo("first "))
		p := e.run("restarts")
		c := p.start("c", idle, withSockets(client, path, "/s"))
		c.want(clientDir+"/sockclient ask /s hello", "first hello")
		s.close()
		if r := c.exec(clientDir + "/sockclient ask /s hello"); strings.Contains(r.stdout, "hello") {
			e.Errorf("without a server: %v", r)
		}
		e.listen(path, echo("second "))
		c.want(clientDir+"/sockclient ask /s hello", "second hello")
		p.remove()
		e.settled()
	})
}

func TestSocketThatIsNotAllowed(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		client, path := e.sockClient(), filepath.Join(e.d.Dir, "s", "echo.sock")
		e.listen(path, echo(""))
		e.configure(daemon.Settings{"runtime": {"allowed_sockets": []string{"/run/spire/*.sock"}}})
		p := e.run("refused")
		if _, err := p.tryStart("c", idle, withSockets(client, path, "/s")); err == nil || !strings.Contains(err.Error(), "runtime.allowed_sockets") {
			e.Errorf("start with a socket that is not allowed: %v", err)
		}
		// The pod's others are not harmed.
		p.start("d", idle).want("echo fine", "fine")
		p.remove()
		e.settled()
	})
}

// A shim that is killed leaves neither the processes that connect nor their cgroups;
// one of those that is killed is replaced.
func TestSocketsAfterAKill(t *testing.T) {
	each(t, setup{husk: true}, func(e *env) {
		client, path := e.sockClient(), filepath.Join(e.d.Dir, "s", "echo.sock")
		e.listen(path, echo(""))
		p := e.run("killed")
		c := p.start("c", idle, withSockets(client, path, "/s"))
		d := p.start("d", idle, withSockets(client, path, "/s"), asUser(1234, 2345))
		ask := func() {
			e.Helper()
			for _, c := range []*container{c, d} {
				c.want(clientDir+"/sockclient ask /s hello", "hello")
			}
		}
		ask()
		dialers := e.processes("husk-dialer")
		if len(dialers) != 2 {
			e.Fatalf("processes that connect: %v, want one for each container", dialers)
		}
		e.kill(dialers[0])
		ask()
		e.kill(e.processes("containerd-shim")[0])
		e.wantEnd(callTimeout, p, c, d)
		p.remove()
		e.settled() // and the daemon's end looks for cgroups
	})
}
