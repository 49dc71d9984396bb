package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/husk-containers/husk/test/daemon"
)

func TestHostsNetwork(t *testing.T) {
	eachHusk(t, func(e *env) {
		host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "from the host") //nolint:errcheck // the container tells
		}))
		defer host.Close()
		_, port, err := net.SplitHostPort(host.Listener.Addr().String())
		if err != nil {
			e.Fatal(err)
		}
		own := freePort(e)
		c := e.startSh("net", fmt.Sprintf(
			`gateway=$(ip route | awk '$1 == "default" { print $3 }'); timeout 60 wget -q -O - http://$gateway:%s; echo; `+
				`while :; do echo from the container | nc -l -p %d; done`, port, own), "--net-host")
		c.expect("from the host\n")
		var got []byte
		for end := time.Now().Add(commandTimeout); len(got) == 0 && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			got, err = dialAndRead(own)
		}
		if string(got) != "from the container\n" {
			e.Errorf("port %d of the host: %q, %v", own, got, err)
		}
		e.must("task", "kill", "--signal", "SIGKILL", e.d.ID("net"))
		c.wait()
		if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", own)); err == nil {
			conn.Close()
			e.Errorf("port %d is still open on the host", own)
		}
	})
}

// freePort is one that nobody has for now.
func freePort(e *env) int {
	e.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		e.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func dialAndRead(port int) ([]byte, error) {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(conn)
	return got, errors.Join(err, conn.Close())
}

func TestHostsNetworkRefused(t *testing.T) {
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"network": {"host_network": "refuse"}})
		e.oneClearError(e.sh("echo never", "--net-host"), "host's network", "network.host_network")
	})
}

func TestNewNetworkNamespaceHasLoopbackOnly(t *testing.T) {
	each(t, func(e *env) {
		if r := e.sh("ls /sys/class/net; ip route"); strings.TrimSpace(r.stdout) != "lo" {
			e.Errorf("%v", r)
		}
	})
}

func TestNewNetworkNamespaceWithUserModeNetworking(t *testing.T) {
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"network": {"unconfigured_network": "user"}})
		if r := e.sh("ip route"); !strings.Contains(r.stdout, "default via ") {
			e.Errorf("%v", r)
		}
	})
}
