package cri

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPodIsReachableFromItsNode(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("pod")
		p.start("a", greeter("8080", "v4"))
		p.start("b", greeter("[::]:8081", "v6"))
		e.wantGreeting(e.d.NetNS(), p.ip4()+":8080", "v4")
		e.wantGreeting(e.d.NetNS(), "["+p.ip6()+"]:8081", "v6")
		// From its own network namespace, too: it is the same address there.
		e.wantGreeting(p.netns(), p.ip4()+":8080", "v4")
		e.wantGreeting(p.netns(), "127.0.0.1:8080", "v4")
	})
}

func TestPodsReachEachOther(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p, q := e.run("one"), e.run("other")
		a := p.start("a", greeter("8080", "one"))
		b := q.start("b", greeter("[::]:8080", "other"))
		b.want(fetch(p.ip4()+":8080"), "one")
		a.want(fetch("["+q.ip6()+"]:8080"), "other")
		// Enough to fill every queue on the way, and segments of full size.
		sum := a.sh("dd if=/dev/urandom of=/tmp/one/data bs=64k count=128 2>/dev/null; md5sum < /tmp/one/data")
		b.want("wget -q -O - http://"+p.ip4()+":8080/data | md5sum", sum)
	})
}

func TestPodReachesItsNodesPorts(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("pod")
		a := p.start("a", idle)
		e.serve(e.d.NetNS(), node4+":9000", "node")
		e.serve(e.d.NetNS(), "["+node6+"]:9000", "node by v6")
		a.want(fetch(node4+":9000"), "node")
		a.want(fetch("["+node6+"]:9000"), "node by v6")
		e.serveDNS(e.d.NetNS(), node4+":53")
		if r := a.exec("timeout 20 nslookup unknown.test " + node4); !strings.Contains(r.stdout+r.stderr, "NXDOMAIN") {
			e.Errorf("question by UDP: %v", r)
		}
		// A port of the node's loopback is the node's own.
		e.serve(e.d.NetNS(), "127.0.0.1:9001", "private")
		if r := a.exec("timeout 5 wget -q -O - http://127.0.0.1:9001/"); r.code == 0 {
			e.Errorf("the node's loopback answers in the pod: %v", r)
		}
	})
}

func TestContainersReachEachOtherOnLoopback(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("loopback")
		p.start("a", greeter("127.0.0.1:8080", "v4"))
		p.start("b", greeter("[::1]:8080", "v6"))
		c := p.start("c", idle)
		c.want(fetch("127.0.0.1:8080"), "v4")
		c.want(fetch("[::1]:8080"), "v6")
		p2 := e.run("another")
		if r := p2.start("d", idle).exec("timeout 5 wget -q -O - http://" + p.ip4() + ":8080/"); r.code == 0 {
			e.Errorf("a port of the pod's loopback answers another pod: %v", r)
		}
	})
}

func TestMACAndMTUAreTheInterfaces(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("mtu")
		a := p.start("a", idle)
		a.want("cat /sys/class/net/eth0/mtu", "1400")
		a.want("cat /sys/class/net/eth0/address", e.mac(p.netns(), "eth0"))
		// It is honoured: a full packet passes, without fragments.
		a.sh(fmt.Sprintf("ping -c 1 -W 30 -s %d %s", 1400-28, node4))
	})
}

// mac is that of an interface in the namespace at path.
func (e *env) mac(path, name string) string {
	e.Helper()
	fields := strings.Fields(e.in(path, "ip -o link show dev "+name))
	for i, f := range fields[:len(fields)-1] {
		if f == "link/ether" {
			return fields[i+1]
		}
	}
	e.Fatalf("no address of %s in %q", name, fields)
	return ""
}

// more is what a plugin at the end of a chain may do to an interface.
const more = `
ip addr add 10.99.0.5/32 dev eth0
ip addr add fd00:99::5/64 dev eth0 nodad
ip route add 198.51.100.0/24 via 10.88.0.77 dev eth0 metric 300
ip route add 203.0.113.0/24 dev eth0 scope link src 10.99.0.5
ip -6 route add 2001:db8:7::/48 via fd00:88::77 dev eth0
ip neigh add 10.88.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent`

func TestAllAddressesRoutesAndPermanentNeighbours(t *testing.T) {
	network := chain("more", bridgePlugin("cni0", 1400, nil, subnet4, subnet6), script(more))
	each(t, setup{networks: []string{network}}, func(e *env) {
		p := e.run("all")
		a := p.start("a", idle)
		for script, want := range map[string][]string{
			"ip -4 -o addr show dev eth0": {p.ip4() + "/24", "10.99.0.5/32"},
			"ip -6 -o addr show dev eth0": {p.ip6() + "/64", "fd00:99::5/64", "fe80::"},
			"ip -4 route": {
				"default via 10.88.0.1 dev eth0", "10.88.0.0/24 dev eth0", "198.51.100.0/24 via 10.88.0.77 dev eth0",
				"metric 300", "203.0.113.0/24 dev eth0", "src 10.99.0.5",
			},
			"ip -6 route":                 {"default via fd00:88::1 dev eth0", "fd00:88::/64 dev eth0", "2001:db8:7::/48 via fd00:88::77 dev eth0"},
			"ip neigh show nud permanent": {"10.88.0.77 dev eth0 lladdr 02:00:00:00:00:77"},
		} {
			// An address that the host's kernel still looks for doubles of comes later.
			e.within(time.Minute, script, func(context.Context) error {
				got := a.sh(script)
				for _, text := range want {
					if !strings.Contains(strings.Join(strings.Fields(got), " "), text) {
						return fmt.Errorf("no %q in\n%s", text, got)
					}
				}
				return nil
			})
		}
	})
}

func TestSeveralInterfaces(t *testing.T) {
	networks := []string{bridge("cni0", 1400, subnet4), chain("second", map[string]any{
		"type": "bridge", "bridge": "cni1", "isGateway": true, "mtu": 1300,
		"ipam": map[string]any{"type": "host-local", "dataDir": "{dir}/addresses", "ranges": []any{[]any{map[string]any{"subnet": "10.89.0.0/24"}}}},
	})}
	each(t, setup{networks: networks}, func(e *env) {
		p := e.run("several")
		a := p.start("a", idle)
		a.want("ls /sys/class/net | sort | tr '\\n' ' '", "eth0 eth1 lo")
		a.want("cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu", "1400\n1300")
		for _, name := range []string{"eth0", "eth1"} {
			a.want("cat /sys/class/net/"+name+"/address", e.mac(p.netns(), name))
		}
		e.serve(e.d.NetNS(), "10.88.0.1:9000", "first")
		e.serve(e.d.NetNS(), "10.89.0.1:9000", "second")
		a.want(fetch("10.88.0.1:9000"), "first")
		a.want(fetch("10.89.0.1:9000"), "second")
	})
}

func TestMacvlan(t *testing.T) {
	network := chain("macvlan", map[string]any{"type": "macvlan", "master": "parent", "mode": "bridge", "ipam": ipam("10.90.0.0/24")})
	each(t, setup{networks: []string{network}}, func(e *env) {
		e.node("ip link add parent type veth peer name far; ip link set parent up; ip addr add 10.90.0.1/24 dev far; ip link set far up")
		p := e.run("macvlan")
		a := p.start("a", greeter("8080", "macvlan"))
		e.wantGreeting(e.d.NetNS(), p.ip4()+":8080", "macvlan")
		e.serve(e.d.NetNS(), "10.90.0.1:9000", "node")
		a.want(fetch("10.90.0.1:9000"), "node")
	})
}

// followLimit is how long a change in the network namespace may take to be seen
// in the pod.
const followLimit = 20 * time.Second

// soon is want for what is about to be so.
func (c *container) soon(script, want string) {
	c.e.Helper()
	c.e.within(followLimit, script, func(context.Context) error {
		if got := c.sh(script); got != want {
			return fmt.Errorf("got %q, want %q", got, want)
		}
		return nil
	})
}

func TestInterfacesThatComeChangeAndGoAreFollowed(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("followed")
		a := p.start("a", idle)
		path, address := p.netns(), p.ip4()
		e.node("ip link add far7 type veth peer name near7; ip addr add 10.77.0.1/24 dev far7; ip link set far7 up")
		e.serve(e.d.NetNS(), "10.77.0.1:9000", "later")
		e.node("ip link set near7 netns " + path + " name eth7")
		e.in(path, "ip link set eth7 mtu 1450; ip addr add 10.77.0.2/24 dev eth7; ip link set eth7 up")
		a.soon("ip -4 -o addr show dev eth7 2>/dev/null | grep -o '10[0-9./]*' | head -n 1", "10.77.0.2/24")
		a.soon("cat /sys/class/net/eth7/mtu", "1450")
		a.want("cat /sys/class/net/eth7/address", e.mac(path, "eth7"))
		a.want(fetch("10.77.0.1:9000"), "later")
		// Changes to what is there
		e.in(path, "ip addr add 10.77.0.3/24 dev eth7; ip route add 198.51.100.0/24 via 10.77.0.1; ip link set eth7 mtu 1350")
		a.soon("ip -4 -o addr show dev eth7 | grep -c inet", "2")
		a.soon("ip route | grep -c '198.51.100.0/24 via 10.77.0.1 dev eth7'", "1")
		a.soon("cat /sys/class/net/eth7/mtu", "1350")
		e.in(path, "ip route del 198.51.100.0/24; ip addr del 10.77.0.3/24 dev eth7")
		a.soon("ip -4 -o addr show dev eth7 | grep -c inet", "1")
		a.soon("ip route | grep -c 198.51.100.0; true", "0")
		// It goes.
		e.in(path, "ip link del eth7")
		a.soon("ls /sys/class/net | sort | tr '\\n' ' '", "eth0 lo")
		e.serve(e.d.NetNS(), node4+":9000", "first")
		a.want(fetch(node4+":9000"), "first")
		if got := p.ip4(); got != address {
			e.Errorf("address %s, before %s", got, address)
		}
	})
}

// TestUnconfiguredNamespaceHasLoopbackOnly is of a plain container: CRI runs no
// pod without an address.
func TestUnconfiguredNamespaceHasLoopbackOnly(t *testing.T) {
	each(t, setup{}, func(e *env) {
		runtime := "io.containerd.husk.v2"
		if !e.isHusk() {
			runtime = "io.containerd.runc.v2"
		}
		ctx, cancel := e.call()
		defer cancel()
		cmd := e.d.Ctr(ctx, "run", "--rm", "--runtime", runtime, "--fifo-dir", e.d.FIFODir(), "example.test/busybox:latest", e.d.ID("plain"),
			"sh", "-c", "ls /sys/class/net; ip route; ping -c 1 -W 10 127.0.0.1 > /dev/null && echo alive")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		// runc sets no loopback up, Husk does: both are down or up as a whole.
		if err := cmd.Run(); err != nil && e.isHusk() {
			e.Errorf("ctr run: %v: %s", err, stderr.String())
		}
		if got := strings.TrimSuffix(stdout.String(), "alive\n"); got != "lo\n" {
			e.Errorf("interfaces and routes %q, want loopback only", got)
		}
	})
}

func hostNetwork(c *runtime.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	c.Hostname = ""
}

func TestPodOfTheHostsNetwork(t *testing.T) {
	each(t, setup{}, func(e *env) {
		world := e.world()
		e.serve(world, "192.0.2.3:9000", "world")
		p := e.run("host", hostNetwork)
		a := p.start("a", greeter("8080", "pod"))
		b := p.start("b", idle)
		a.want(fetch("192.0.2.3:9000"), "world")
		b.want(fetch("127.0.0.1:8080"), "pod")
		e.wantGreeting(e.d.NetNS(), "127.0.0.1:8080", "pod")
		e.wantGreeting(world, "192.0.2.2:8080", "pod")
		// A port that is not bound any more is refused.
		a.stop()
		e.within(followLimit, "the port is closed", func(context.Context) error {
			if got, err := greet(world, "192.0.2.2:8080"); err == nil {
				return fmt.Errorf("it answers %q", got)
			}
			return nil
		})
		if got := len(e.d.PodNetNS()); got != 0 {
			e.Errorf("%d network namespaces for a pod of the host's network", got)
		}
		p.remove()
		e.settled()
	})
}

func TestPortForward(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("forward")
		p.start("a", greeter("127.0.0.1:8080", "loopback"))
		p.start("b", greeter("8081", "any"))
		p.start("c", greeter("[::1]:8082", "v6"))
		ports := map[uint16]string{8080: "loopback", 8081: "any"}
		if e.isHusk() { // containerd itself tries ::1 only where the node's hosts file has it
			ports[8082] = "v6"
		}
		for port, want := range ports {
			e.within(time.Minute, fmt.Sprintf("port %d answers", port), func(context.Context) error {
				got, err := p.forward(port, "GET / HTTP/1.0\r\n\r\n")
				if err == nil && !strings.HasSuffix(got, want+"\n") {
					err = fmt.Errorf("got %q, want %q", got, want)
				}
				return err
			})
		}
		// The port of the pod's address alone has nothing to do with it.
		if got, err := p.forward(8083, "GET / HTTP/1.0\r\n\r\n"); err == nil {
			e.Errorf("a port that nobody listens on answers %q", got)
		}
	})
}

// TestPortForwardCarriesMuch holds that data passes whole, both ways at once.
func TestPortForwardCarriesMuch(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("much")
		p.start("a", "exec nc -ll -p 7 -e cat")
		var conn net.Conn
		e.within(time.Minute, "a connection", func(context.Context) (err error) {
			conn, err = dialIn(p.netns(), "tcp", "127.0.0.1:7")
			if err != nil {
				return err
			}
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err = conn.Write([]byte("!")); err == nil {
				_, err = io.ReadFull(conn, make([]byte, 1))
			}
			if err != nil {
				conn.Close()
			}
			return err
		})
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(callTimeout))
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
		written := make(chan error, 1)
		go func() { // ends with the connection's deadline
			_, err := conn.Write(data)
			if err == nil {
				err = conn.(*net.TCPConn).CloseWrite()
			}
			written <- err
		}()
		got, err := io.ReadAll(conn)
		if err := <-written; err != nil {
			e.Error(err)
		}
		if err != nil || !bytes.Equal(got, data) {
			e.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
		}
	})
}

// TestTrafficLeavesByThePodsNamespace looks from the other end: what a server
// outside sees as its client is the pod's address.
func TestTrafficLeavesByThePodsNamespace(t *testing.T) {
	each(t, setup{}, func(e *env) {
		p := e.run("leaves")
		a := p.start("a", idle)
		l, err := listenIn(e.d.NetNS(), node4+":9000")
		if err != nil {
			e.Fatal(err)
		}
		defer l.Close()
		from := make(chan string, 1)
		go func() { // ends with the listener
			defer close(from)
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			from <- conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String()
		}()
		a.exec("timeout 30 wget -q -O - http://" + node4 + ":9000/")
		l.Close()
		if got := <-from; got != p.ip4() {
			e.Errorf("the client's address is %q, want the pod's, %v", got, netip.MustParseAddr(p.ip4()))
		}
		// Cut off there, it has no other way.
		e.in(p.netns(), "ip link set eth0 down")
		if r := a.exec("ping -c 1 -W 5 " + node4); r.code == 0 {
			e.Error("the pod reaches its node although its interface is down")
		}
	})
}
