package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// The addresses of the usual network; its gateway, the node, has the first.
const (
	subnet4 = "10.88.0.0/24"
	subnet6 = "fd00:88::/64"
	node4   = "10.88.0.1"
	node6   = "fd00:88::1"
)

// bridge is a CNI configuration of a bridge with addresses of these subnets.
func bridge(name string, mtu int, subnets ...string) string {
	return chain(name, bridgePlugin(name, mtu, nil, subnets...))
}

// chain is a CNI configuration of plugins that are called one after another.
func chain(name string, plugins ...map[string]any) string {
	data, err := json.Marshal(map[string]any{"cniVersion": "0.4.0", "name": "{token}-" + name, "plugins": plugins})
	if err != nil {
		panic(err) // it is plain data
	}
	return string(data)
}

func bridgePlugin(name string, mtu int, more map[string]any, subnets ...string) map[string]any {
	plugin := map[string]any{"type": "bridge", "bridge": name, "isGateway": true, "hairpinMode": true, "mtu": mtu, "ipam": ipam(subnets...)}
	for key, value := range more {
		plugin[key] = value
	}
	return plugin
}

func ipam(subnets ...string) map[string]any {
	ranges, routes := []any{}, []any{}
	for _, s := range subnets {
		ranges = append(ranges, []any{map[string]any{"subnet": s}})
		if strings.Contains(s, ":") {
			routes = append(routes, map[string]any{"dst": "::/0"})
		} else {
			routes = append(routes, map[string]any{"dst": "0.0.0.0/0"})
		}
	}
	return map[string]any{"type": "host-local", "dataDir": "{dir}/addresses", "ranges": ranges, "routes": routes}
}

// pluginName is a CNI plugin that the test's program is: it runs a shell script
// in the pod's network namespace and passes on what plugins before it said.
const pluginName = "husktest"

func script(text string) map[string]any { return map[string]any{"type": pluginName, "script": text} }

// servePlugin is the plugin where the process was started as that.
func servePlugin() {
	if filepath.Base(os.Args[0]) != pluginName {
		return
	}
	var in struct {
		CNIVersion string          `json:"cniVersion"`
		Script     string          `json:"script"`
		PrevResult json.RawMessage `json:"prevResult"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	switch os.Getenv("CNI_COMMAND") {
	case "ADD":
		cmd := exec.Command("nsenter", "--net="+os.Getenv("CNI_NETNS"), "sh", "-euc", in.Script)
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Printf(`{"cniVersion":%q,"code":100,"msg":%q}`, in.CNIVersion, fmt.Sprintf("script: %v: %s", err, out))
			os.Exit(1)
		}
		os.Stdout.Write(in.PrevResult)
	case "VERSION":
		fmt.Print(`{"cniVersion":"0.4.0","supportedVersions":["0.4.0"]}`)
	}
	os.Exit(0)
}

// enter calls f on a thread in the network namespace at path.
func enter(path string, f func() error) error {
	done := make(chan error)
	go func() {
		// The thread ends with the goroutine, for it stays locked.
		runtime.LockOSThread()
		done <- func() error {
			ns, err := netns.GetFromPath(path)
			if err != nil {
				return fmt.Errorf("open network namespace %s: %w", path, err)
			}
			defer ns.Close()
			if err := netns.Set(ns); err != nil {
				return fmt.Errorf("enter network namespace %s: %w", path, err)
			}
			return f()
		}()
	}()
	return <-done
}

// dialIn connects from the network namespace at path.
func dialIn(path, network, address string) (conn net.Conn, err error) {
	err = enter(path, func() error {
		// A resolved address is dialled on this thread.
		conn, err = net.DialTimeout(network, address, 10*time.Second)
		return err
	})
	return conn, err
}

// listenIn listens in the network namespace at path.
func listenIn(path, address string) (l net.Listener, err error) {
	err = enter(path, func() error {
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// in runs a shell script in the network namespace at path.
func (e *env) in(path, script string) string {
	e.Helper()
	ctx, cancel := e.call()
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--net="+path, "sh", "-euc", script)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		e.Fatalf("%q in %s: %v: %s", script, path, err, out)
	}
	return strings.TrimSpace(string(out))
}

// node runs a shell script in the node's network namespace.
func (e *env) node(script string) string {
	e.Helper()
	return e.in(e.d.NetNS(), script)
}

// greet asks the HTTP server at address, from the namespace at path.
func greet(path, address string) (string, error) {
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return dialIn(path, "tcp", address) },
	}}
	r, err := client.Get("http://" + address + "/")
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	data, err := io.ReadAll(r.Body)
	return string(bytes.TrimSpace(data)), err
}

// wantGreeting waits for an answer from a server that may be about to listen.
func (e *env) wantGreeting(path, address, want string) {
	e.Helper()
	e.within(time.Minute, "an answer from "+address, func(context.Context) error {
		got, err := greet(path, address)
		if err == nil && got != want {
			err = fmt.Errorf("got %q, want %q", got, want)
		}
		return err
	})
}

// serve runs an HTTP server at address in the namespace at path, which answers
// with text, until the test's end.
func (e *env) serve(path, address, text string) {
	e.Helper()
	var l net.Listener
	e.within(time.Minute, "listen on "+address, func(context.Context) (err error) { // a new v6 address is tentative at first
		l, err = listenIn(path, address)
		return err
	})
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, text) })}
	done := make(chan struct{})
	go func() { // ends with the server
		defer close(done)
		server.Serve(l)
	}()
	e.Cleanup(func() {
		server.Close()
		<-done
	})
}

// serveDNS runs a DNS server at address in the namespace at path until the
// test's end. It knows no name, and says so.
func (e *env) serveDNS(path, address string) {
	e.Helper()
	var conn net.PacketConn
	err := enter(path, func() (err error) {
		conn, err = net.ListenPacket("udp", address)
		return err
	})
	if err != nil {
		e.Fatalf("listen on %s: %v", address, err)
	}
	done := make(chan struct{})
	go func() { // ends with the socket
		defer close(done)
		query := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(query)
			if err != nil {
				return
			}
			if n > 3 {
				query[2], query[3] = 0x81, 0x83 // an answer: no such name
				conn.WriteTo(query[:n], from)
			}
		}
	}()
	e.Cleanup(func() {
		conn.Close()
		<-done
	})
}

// greeter is a script that runs an HTTP server at address:port, which answers
// with text.
func greeter(address, text string) string {
	return fmt.Sprintf("mkdir -p /tmp/%[2]s && echo %[2]s > /tmp/%[2]s/index.html && httpd -f -p %[1]s -h /tmp/%[2]s", address, text)
}

// fetch is a script that asks an HTTP server, as often as it takes. (A static
// busybox's wget does not survive its own time-out.)
func fetch(address string) string {
	return fmt.Sprintf("for i in $(seq 100); do timeout 10 wget -q -O - http://%s/ && exit; sleep 0.1; done; exit 1", address)
}

// ip4 is the pod's v4 address, ip6 the v6 one.
func (p *pod) ip4() string {
	p.e.Helper()
	ip := p.status().GetNetwork().GetIp()
	if ip == "" {
		p.e.Fatalf("pod %s has no address", p.config.Metadata.Name)
	}
	return ip
}

func (p *pod) ip6() string {
	p.e.Helper()
	for _, ip := range p.status().GetNetwork().GetAdditionalIps() {
		if strings.Contains(ip.Ip, ":") {
			return ip.Ip
		}
	}
	p.e.Fatalf("pod %s has no v6 address", p.config.Metadata.Name)
	return ""
}

// netns is the path of the pod's network namespace: that which has its address.
func (p *pod) netns() string {
	p.e.Helper()
	want := p.ip4()
	for _, path := range p.e.d.PodNetNS() {
		found := false
		err := enter(path, func() error {
			addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
			for _, a := range addresses {
				found = found || a.IP.String() == want
			}
			return err
		})
		if err == nil && found {
			return path
		}
	}
	p.e.Fatalf("no network namespace has the address %s; there are %v", want, p.e.d.PodNetNS())
	return ""
}

// world makes the world outside the node: a network namespace, whose path is
// returned, at the end of the node's uplink. The node has 192.0.2.2 there and a
// default route, the world 192.0.2.1, the route's gateway, and 192.0.2.3.
func (e *env) world() string {
	e.Helper()
	sleep := exec.Command("unshare", "--net", "sleep", "10000")
	if err := sleep.Start(); err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		sleep.Process.Kill()
		sleep.Wait()
	})
	path := fmt.Sprintf("/proc/%d/ns/net", sleep.Process.Pid)
	e.eventually("the world has a namespace of its own", func(context.Context) error {
		own, err := os.Readlink("/proc/thread-self/ns/net")
		if there, e := os.Readlink(path); err == nil && (e != nil || there == own) {
			err = fmt.Errorf("%s: %s, %v", path, there, e)
		}
		return err
	})
	e.node(fmt.Sprintf("ip link add uplink type veth peer name world netns %d", sleep.Process.Pid))
	e.in(path, "ip link set lo up; ip addr add 192.0.2.1/24 dev world; ip addr add 192.0.2.3/24 dev world; ip link set world up")
	e.node("ip addr add 192.0.2.2/24 dev uplink; ip link set uplink up; ip route add default via 192.0.2.1")
	return path
}

// podLinks lists what is in the node's namespace beside loopback and bridges.
func (e *env) podLinks() []string {
	var names []string
	err := enter(e.d.NetNS(), func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "veth" && l.Attrs().MasterIndex != 0 || l.Type() == "tuntap" {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		names = append(names, err.Error())
	}
	return names
}
