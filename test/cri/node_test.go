package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
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

// greet connects from the namespace at path and returns all that comes back.
func greet(path, address string) (string, error) {
	conn, err := dialIn(path, "tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	data, err := io.ReadAll(conn)
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

// serve has each connection to address in the namespace at path get text.
func (e *env) serve(path, address, text string) {
	e.Helper()
	l, err := listenIn(path, address)
	if err != nil {
		e.Fatalf("listen on %s: %v", address, err)
	}
	done := make(chan struct{})
	go func() { // ends with the listener
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, text)
			conn.Close()
		}
	}()
	e.Cleanup(func() {
		l.Close()
		<-done
	})
}

// greeter is a script that answers each connection to an address with text; in
// the background.
func greeter(address, port, text string) string {
	return fmt.Sprintf("nc -lk -s %s -p %s -e echo %s & ", address, port, text)
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
