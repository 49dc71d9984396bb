package usernet

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

var testMAC = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}

func TestPlan(t *testing.T) {
	const common = "--foreground --quiet --stderr --fd 3 --interface eth1 --mac-addr 0a:68:75:73:6b:01 --mtu 1500 " +
		"--address 192.0.0.2 --netmask 29 --gateway 192.0.0.1 --dns-forward 192.0.0.1 " +
		"--tcp-ports none --udp-ports none --no-dhcp --no-dhcpv6 --no-ra "
	four := &agentv1.Network{
		Interfaces: []*agentv1.Interface{{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1500, Addresses: []string{"192.0.0.2/29"}}},
		Routes:     []*agentv1.Route{{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "192.0.0.1"}},
	}
	both := &agentv1.Network{
		Interfaces: []*agentv1.Interface{{
			Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1500,
			Addresses: []string{"192.0.0.2/29", "fd68:7573:6b00::2/64"},
		}},
		Routes: []*agentv1.Route{
			{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "192.0.0.1"},
			{Interface: "eth0", Destination: "::/0", Gateway: "fe80::1"},
		},
	}
	for _, tt := range []struct {
		name  string
		ipv6  bool
		args  string
		guest *agentv1.Network
	}{
		{"IPv4 alone", false, common + "--ipv4-only", four},
		{"both", true, common + "--address fd68:7573:6b00::2 --gateway fe80::1 --dns-forward fe80::1", both},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := plan{mac: testMAC, mtu: 1500, host: host{device: "eth1", ipv6: tt.ipv6}}
			if diff := cmp.Diff(strings.Fields(tt.args), p.args()); diff != "" {
				t.Errorf("args (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.guest, p.guest(), protocmp.Transform()); diff != "" {
				t.Errorf("guest (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLook(t *testing.T) {
	l := func(name string, addrs ...string) link {
		result := link{name: name}
		for _, a := range addrs {
			result.addrs = append(result.addrs, netip.MustParseAddr(a))
		}
		return result
	}
	lo := l("lo", "127.0.0.1", "::1")
	for _, tt := range []struct {
		name  string
		links []link
		want  host
	}{
		{"nothing", nil, host{device: "lo"}},
		{"loopback", []link{lo}, host{device: "lo"}},
		{"IPv4", []link{lo, l("eth0", "10.0.0.1")}, host{device: "lo"}},
		{"IPv6 on the link alone", []link{lo, l("eth0", "10.0.0.1", "fe80::1")}, host{device: "lo"}},
		{"IPv6 without a link-local address", []link{lo, l("tun0", "2001:db8::1")}, host{device: "lo"}},
		{"both", []link{lo, l("eth0", "10.0.0.1", "fe80::1", "2001:db8::1")}, host{device: "eth0", ipv6: true}},
		{"unique local", []link{lo, l("eth0", "fd00::1", "fe80::1")}, host{device: "eth0", ipv6: true}},
		{"address on loopback", []link{l("lo", "::1", "2001:db8::1"), l("eth0", "fe80::1"), l("eth1", "fe80::2")}, host{device: "eth0", ipv6: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := look(tt.links); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}
