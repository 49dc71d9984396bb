package network

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A plan is a Network in the kernel's terms: names resolved to indices, texts to
// addresses. Each list is in the order in which it is to be applied.
type plan struct {
	links      []int
	addresses  []address
	routes     []route
	neighbours []neighbour
}

type address struct {
	dev    device
	prefix netip.Prefix
	// noRoute keeps the kernel from making a route to the address's subnet.
	noRoute bool
}

type route struct {
	dev                               device // zero where the route leads nowhere
	dst                               netip.Prefix
	gateway, source                   netip.Addr // may be the zero Addr
	priority, scope, kind, table, mtu uint32
	onLink                            bool
}

type neighbour struct {
	dev  device
	addr netip.Addr
	mac  string
}

// A device is an interface by its index; the name is for errors.
type device struct {
	index int
	name  string
}

// resolve makes a plan of n, which is valid. index gives the index of each
// interface by its name.
func resolve(n *agentv1.Network, index map[string]int) plan {
	var p plan
	dev := func(name string) device { return device{index[name], name} }
	given := make(map[route]bool) // dev, dst of routes in the main table
	for _, r := range n.GetRoutes() {
		to := route{
			dev: dev(r.GetInterface()), dst: netip.MustParsePrefix(r.GetDestination()),
			priority: r.GetPriority(), scope: r.GetScope(), kind: r.GetType(), table: r.GetTable(), mtu: r.GetMtu(),
			onLink: r.GetOnLink(),
		}
		to.gateway, _ = netip.ParseAddr(r.GetGateway()) // the zero Addr where there is none
		to.source, _ = netip.ParseAddr(r.GetSource())
		p.routes = append(p.routes, to)
		if to.table == 0 || to.table == unix.RT_TABLE_MAIN {
			given[route{dev: to.dev, dst: to.dst}] = true
		}
	}
	for _, i := range n.GetInterfaces() {
		p.links = append(p.links, index[i.GetName()])
		for _, s := range i.GetAddresses() {
			prefix := netip.MustParsePrefix(s)
			p.addresses = append(p.addresses, address{
				dev: dev(i.GetName()), prefix: prefix,
				noRoute: given[route{dev: dev(i.GetName()), dst: prefix.Masked()}],
			})
		}
	}
	for _, nb := range n.GetNeighbours() {
		p.neighbours = append(p.neighbours, neighbour{
			dev(nb.GetInterface()), netip.MustParseAddr(nb.GetAddress()), strings.ToLower(nb.GetMac()),
		})
	}
	return p
}

// String names an address in errors, and so on.
func (a address) String() string {
	return fmt.Sprintf("address %s of interface %q", a.prefix, a.dev.name)
}

func (r route) String() string {
	s := "route to " + r.dst.String()
	if r.gateway.IsValid() {
		s += " via " + r.gateway.String()
	}
	if r.dev.name != "" {
		s += fmt.Sprintf(" by interface %q", r.dev.name)
	}
	return s
}

func (n neighbour) String() string {
	return fmt.Sprintf("neighbour %s of interface %q", n.addr, n.dev.name)
}
