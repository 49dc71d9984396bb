package agentv1

import (
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
)

// network returns a valid network with everything in it, changed by edit.
func network(edit func(*Network)) *Network {
	m := &Network{
		Interfaces: []*Interface{
			{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1500, Addresses: []string{"10.1.0.2/16", "fd00::2/64"}},
			{Mac: "02:00:00:00:00:0A", Name: "net1", Mtu: 68, NoArp: true},
		},
		Routes: []*Route{
			{Interface: "eth0", Destination: "10.1.0.1/32", Scope: 253, Source: "10.1.0.2"},
			{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "10.1.0.1", Priority: 5, Mtu: 1400},
			{Interface: "eth0", Destination: "::/0", Gateway: "fe80::1", OnLink: true, Table: 100},
			{Interface: "eth0", Destination: "192.0.2.0/24", Gateway: "fe80::1"},
			{Destination: "198.51.100.0/24", Type: typeUnreachable},
		},
		Neighbours: []*Neighbour{{Interface: "net1", Address: "10.2.0.1", Mac: "02:00:00:00:00:ff"}},
	}
	edit(m)
	return m
}

// repeat returns n of what made makes.
func repeat[T any](n int, made func(i int) T) []T {
	all := make([]T, n)
	for i := range all {
		all[i] = made(i)
	}
	return all
}

func TestValidateNetwork(t *testing.T) {
	edit := func(f func(*Network)) *Network { return network(f) }
	dev := func(f func(*Interface)) *Network { return network(func(m *Network) { f(m.Interfaces[0]) }) }
	route := func(f func(*Route)) *Network { return network(func(m *Network) { f(m.Routes[1]) }) }
	drop := func(f func(*Route)) *Network { return network(func(m *Network) { f(m.Routes[4]) }) }
	neighbour := func(f func(*Neighbour)) *Network { return network(func(m *Network) { f(m.Neighbours[0]) }) }
	listen := func(f func(*ListenEvent)) *Event {
		e := &ListenEvent{Protocol: ListenEvent_PROTOCOL_UDP, Address: "::", Port: 53}
		f(e)
		return &Event{Event: &Event_Listen{Listen: e}}
	}
	checkAll(t, []validateCase{
		{"whole", edit(func(*Network) {}), ""},
		{"empty", &Network{}, ""},
		{"33 interfaces", edit(func(m *Network) {
			m.Interfaces = repeat(33, func(i int) *Interface {
				return &Interface{Mac: fmt.Sprintf("02:00:00:00:01:%02x", i), Name: fmt.Sprint("e", i), Mtu: 1500}
			})
		}), "33 interfaces"},
		{"4097 routes", edit(func(m *Network) { m.Routes = repeat(4097, func(int) *Route { return m.Routes[0] }) }), "4097 routes"},
		{"4097 neighbours", edit(func(m *Network) {
			m.Neighbours = repeat(4097, func(int) *Neighbour { return m.Neighbours[0] })
		}), "4097 neighbours"},
		{"two of a name", dev(func(d *Interface) { d.Name = "net1" }), `interfaces[1]: name "net1" is taken`},
		{"two of a MAC", dev(func(d *Interface) { d.Mac = "02:00:00:00:00:0a" }), "interfaces[1]: MAC address 02:00:00:00:00:0a is taken"},

		{"no name", dev(func(d *Interface) { d.Name = "" }), "interfaces[0]: interface name of 0 bytes"},
		{"long name", dev(func(d *Interface) { d.Name = "abcdefghijklmnop" }), "16 bytes"},
		{"loopback", dev(func(d *Interface) { d.Name = "lo" }), `is "lo"`},
		{"dots", dev(func(d *Interface) { d.Name = ".." }), `is ".."`},
		{"slash", dev(func(d *Interface) { d.Name = "a/b" }), `'/'`},
		{"template", dev(func(d *Interface) { d.Name = "eth%d" }), `'%'`},
		{"space", dev(func(d *Interface) { d.Name = "a b" }), `' '`},
		{"no MAC", dev(func(d *Interface) { d.Mac = "" }), "form aa:bb"},
		{"dashes", dev(func(d *Interface) { d.Mac = "02-00-00-00-00-01" }), "form aa:bb"},
		{"long MAC", dev(func(d *Interface) { d.Mac = "02:00:00:00:00:01:02:03" }), "form aa:bb"},
		{"group MAC", dev(func(d *Interface) { d.Mac = "ff:ff:ff:ff:ff:ff" }), "no station's"},
		{"zero MAC", dev(func(d *Interface) { d.Mac = "00:00:00:00:00:00" }), "no station's"},
		{"mtu 67", dev(func(d *Interface) { d.Mtu = 67 }), "mtu 67"},
		{"mtu 65536", dev(func(d *Interface) { d.Mtu = 65536 }), "mtu 65536"},
		{"65 addresses", dev(func(d *Interface) {
			d.Addresses = repeat(65, func(i int) string { return fmt.Sprintf("10.0.0.%d/8", i+1) })
		}), "65 addresses"},
		{"address without length", dev(func(d *Interface) { d.Addresses[0] = "10.1.0.2" }), "addresses[0]"},
		{"address twice", dev(func(d *Interface) { d.Addresses[1] = d.Addresses[0] }), "twice"},
		{"mapped address", dev(func(d *Interface) { d.Addresses[1] = "::ffff:10.1.0.2/120" }), "addresses[1]"},
		{"no address", dev(func(d *Interface) { d.Addresses[1] = "::/0" }), "no interface's"},
		{"group address", dev(func(d *Interface) { d.Addresses[0] = "224.0.0.1/4" }), "no interface's"},

		{"route by none", route(func(r *Route) { r.Interface = "eth9" }), `routes[1]: interface "eth9" is not one`},
		{"route by no name", route(func(r *Route) { r.Interface = "" }), "0 bytes"},
		{"route to nothing", route(func(r *Route) { r.Destination = "default" }), "destination"},
		{"route with host bits", route(func(r *Route) { r.Destination = "10.1.2.3/16" }), "use 10.1.0.0/16"},
		{"gateway of a name", route(func(r *Route) { r.Gateway = "router" }), "gateway"},
		{"gateway with a zone", route(func(r *Route) { r.Gateway = "fe80::1%eth0" }), "gateway"},
		{"gateway nowhere", route(func(r *Route) { r.Gateway = "0.0.0.0" }), "no host's"},
		{"gateway of IPv4", route(func(r *Route) { r.Destination = "::/0" }), "IPv6 destination"},
		{"on link without gateway", route(func(r *Route) { r.Gateway, r.OnLink = "", true }), "on_link"},
		{"source of IPv6", route(func(r *Route) { r.Source = "fd00::2" }), "two families"},
		{"source of a name", route(func(r *Route) { r.Source = "me" }), "source"},
		{"scope 256", route(func(r *Route) { r.Scope = 256 }), "scope 256"},
		{"type broadcast", route(func(r *Route) { r.Type = 3 }), "type 3"},
		{"route mtu 1", route(func(r *Route) { r.Mtu = 1 }), "mtu 1"},
		{"unreachable by an interface", drop(func(r *Route) { r.Interface = "eth0" }), "leads nowhere"},

		{"neighbour of none", neighbour(func(n *Neighbour) { n.Interface = "eth9" }), `neighbours[0]: interface "eth9"`},
		{"neighbour of no name", neighbour(func(n *Neighbour) { n.Interface = "" }), "neighbours[0]"},
		{"neighbour nowhere", neighbour(func(n *Neighbour) { n.Address = "::" }), "no host's"},
		{"neighbour address", neighbour(func(n *Neighbour) { n.Address = "10.1.0.0/16" }), "neighbours[0]"},
		{"neighbour MAC", neighbour(func(n *Neighbour) { n.Mac = "x" }), "neighbours[0]"},

		{"update", &UpdateNetworkRequest{Network: &Network{}}, ""},
		{"update with nothing", &UpdateNetworkRequest{}, "missing"},
		{"update with less", &UpdateNetworkRequest{Network: dev(func(d *Interface) { d.Mtu = 0 })}, "mtu 0"},
		{"configure", configure(func(m *ConfigureRequest) { m.Network, m.ShmBytes = edit(func(*Network) {}), 1<<30 }), ""},
		{"configure less", configure(func(m *ConfigureRequest) { m.Network = dev(func(d *Interface) { d.Mtu = 0 }) }), "network: interfaces[0]: mtu 0"},
		{"configure shm", configure(func(m *ConfigureRequest) { m.ShmBytes = 1<<50 + 1 }), "shm_bytes"},

		{"listen", listen(func(*ListenEvent) {}), ""},
		{"listen by none", listen(func(e *ListenEvent) { e.Protocol = 0 }), "protocol 0"},
		{"listen by another", listen(func(e *ListenEvent) { e.Protocol = 3 }), "protocol 3"},
		{"listen nowhere", listen(func(e *ListenEvent) { e.Address = "" }), "IPv4 or IPv6"},
		{"listen on 0", listen(func(e *ListenEvent) { e.Port = 0 }), "port 0"},
		{"listen on 65536", listen(func(e *ListenEvent) { e.Port = 65536 }), "port 65536"},
		{"listen unset", &Event{Event: &Event_Listen{}}, "protocol 0"},
	})
}

// networkSeeds are what FuzzMessages starts from, by the kinds of messages.
func networkSeeds(t testing.TB, all []validator) map[int][]byte {
	seeds := make(map[int][]byte)
	for i, m := range all {
		var seed proto.Message
		switch m.(type) {
		case *Network:
			seed = network(func(*Network) {})
		case *ListenEvent:
			seed = &ListenEvent{Protocol: ListenEvent_PROTOCOL_TCP, Address: "127.0.0.1", Port: 80}
		case *UpdateNetworkRequest:
			seed = &UpdateNetworkRequest{Network: network(func(*Network) {})}
		default:
			continue
		}
		b, err := proto.Marshal(seed)
		if err != nil {
			t.Fatal(err)
		}
		seeds[i] = b
	}
	return seeds
}
