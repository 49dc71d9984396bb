// Package uplink is what a sandbox's guest reaches others by, chosen by what its
// spec asks for: the interfaces of a given network namespace, user-mode networking,
// or nothing.
package uplink

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/undo"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/forward"
	"github.com/husk-containers/husk/virtcontainers/guest"
	"github.com/husk-containers/husk/virtcontainers/network"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/usernet"
)

// step bounds one step of Close.
const step = 10 * time.Second

// Options is what an Uplink is made of.
type Options struct {
	// Network is what the spec asks for.
	Network spec.Network
	Config  config.Network
	// Queues of each interface, for which the VM has as many vCPUs.
	Queues int
	// Guest is the one to connect. It need not have booted.
	Guest *guest.Guest
	// Started is called for each host process right after it was spawned; its error
	// fails Open.
	Started func(hypervisor.Process) error
	Log     *slog.Logger
}

// An Uplink connects one guest. Its methods are safe for concurrent use.
type Uplink struct {
	o    Options
	log  *slog.Logger
	undo undo.Stack
	nics []hypervisor.NIC
	told *agentv1.Network
	// given is the network of a given namespace, user that of the host's or of none;
	// at most one is not nil.
	given *network.Network
	user  *usernet.Network
	// ports take connections to the host in the guest's stead, where it has the
	// host's network.
	ports *forward.HostPorts
}

// Open makes what is needed on the host, before the VM is. On error nothing is left.
//
//	spec asks for               the guest gets
//	a given namespace           its interfaces, and connections made inside it
//	a new namespace             loopback; user-mode networking where configured
//	no namespace: the host's    user-mode networking, and its ports on the host
func Open(ctx context.Context, o Options) (*Uplink, error) {
	u := &Uplink{o: o, log: o.Log}
	var err error
	switch {
	case o.Network.Path != "":
		err = u.openNamespace(ctx)
	case o.Network.Host && o.Config.HostNetwork == config.HostNetworkRefuse:
		err = fmt.Errorf("the sandbox has no network namespace of its own, which asks for the host's network, "+
			"and the configuration's network.host_network is %q: give the pod a network of its own, or set that to %q: %w",
			o.Config.HostNetwork, config.HostNetworkUser, errdefs.ErrFailedPrecondition)
	case o.Network.Host:
		err = u.openUser(ctx, true)
	case o.Config.UnconfiguredNetwork == config.UnconfiguredNetworkUser:
		err = u.openUser(ctx, false)
	}
	if err != nil {
		return nil, err
	}
	return u, nil
}

// NICs are the devices that the VM is to have.
func (u *Uplink) NICs() []hypervisor.NIC { return u.nics }

// Guest is what the guest is to make of them; nil without.
func (u *Uplink) Guest() *agentv1.Network { return u.told }

// WantsListeners tells whether the guest is to report the ports that its processes
// listen on, which go to Listen.
func (u *Uplink) WantsListeners() bool { return u.ports != nil }

// Listen heeds a report of the guest. Reports come in order, one at a time.
func (u *Uplink) Listen(e *agentv1.ListenEvent) {
	if u.ports != nil {
		u.ports.Apply(e)
	}
}

// Close takes everything back. It is idempotent.
func (u *Uplink) Close(ctx context.Context) error { return u.undo.Run(ctx) }

// Run serves the uplink until ctx ends: it carries changes of a given namespace to
// the guest, and fails the guest when its user-mode network ends.
func (u *Uplink) Run(ctx context.Context) {
	switch {
	case u.given != nil:
		u.follow(ctx)
	case u.user != nil:
		u.watch(ctx)
	}
}

func (u *Uplink) openNamespace(ctx context.Context) error {
	n, err := network.Open(ctx, u.o.Network.Path, network.Options{
		Queues: u.o.Queues, VhostNet: u.o.Config.VhostNet == config.VhostNetAuto, Log: u.log,
	})
	if err != nil {
		return err
	}
	u.undo.Push("close the network", step, func(context.Context) error { return n.Close() })
	if u.o.Config.PortForward {
		pf, err := forward.Open(ctx, n.NS(), u.o.Guest.Dial, u.log)
		if err != nil {
			// Pods are of use without.
			u.log.Warn("connections made inside the pod's network namespace, port-forward's among them, do not reach the guest", "err", err)
		} else {
			u.undo.Push("close port-forward", step, func(context.Context) error { return pf.Close() })
		}
	}
	u.nics, u.told, u.given = n.NICs(), n.Guest(), n
	return nil
}

func (u *Uplink) openUser(ctx context.Context, host bool) error {
	n, err := usernet.Start(ctx, usernet.Options{Passt: u.o.Config.Passt, MAC: randomMAC(), Started: u.o.Started})
	if err != nil {
		return err
	}
	u.undo.Push("end user-mode networking", step, n.Close)
	u.nics, u.told, u.user = []hypervisor.NIC{n.NIC()}, n.Guest(), n
	if host {
		u.ports = forward.NewHostPorts(u.o.Guest.Dial, addresses(u.told), u.log)
		u.undo.Push("close the guest's ports on the host", step, func(context.Context) error { return u.ports.Close() })
	}
	return nil
}

// watch fails the guest when its user-mode network ends. Of itself that ends with
// the VM, which then has its own reason to tell.
func (u *Uplink) watch(ctx context.Context) {
	select {
	case <-u.user.Done():
	case <-ctx.Done():
		return
	}
	if !u.user.Killed() {
		grace := time.NewTimer(guest.LostAgentGrace)
		defer grace.Stop()
		select {
		case <-u.o.Guest.Dead():
			return
		case <-grace.C:
		}
	}
	if err := u.user.Err(); err != nil {
		u.o.Guest.Fail(err)
	}
}

// follow carries changes of the given namespace to the guest.
func (u *Uplink) follow(ctx context.Context) {
	if err := u.o.Guest.Await(ctx); err != nil {
		return
	}
	u.given.CloseFiles()
	if err := u.given.Watch(ctx, u.change); err != nil {
		u.log.Error("changes of the pod's network namespace are not followed any more", "err", err)
	}
}

// change makes one change in the guest. What cannot be made is logged: there
// is nobody who waits for it.
func (u *Uplink) change(ctx context.Context, c network.Change) {
	plug := func(f func(ctx context.Context) error) error {
		ctx, cancel := u.o.Guest.Request(ctx) // the guest has to let go of a device
		defer cancel()
		return f(ctx)
	}
	for _, nic := range c.Added {
		if err := plug(func(ctx context.Context) error { return u.o.Guest.Attach(ctx, nic) }); err != nil {
			u.log.Error("give the guest a network interface", "mac", nic.MAC, "err", err)
			return
		}
	}
	err := u.o.Guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.UpdateNetwork(ctx, &agentv1.UpdateNetworkRequest{Network: c.Guest})
		return err
	})
	if err != nil && !u.o.Guest.Lost(err) {
		u.log.Error("change the guest's network", "err", err)
	}
	for _, id := range c.Removed {
		if err := plug(func(ctx context.Context) error { return u.o.Guest.Detach(ctx, id) }); err != nil && !u.o.Guest.Lost(err) {
			u.log.Error("take a network interface from the guest", "nic", id, "err", err)
		}
	}
}

// randomMAC is a locally administered unicast address.
func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	rand.Read(mac) //nolint:errcheck // never fails since Go 1.24
	mac[0] = mac[0]&^1 | 2
	return mac
}

// addresses are the guest's own but loopback.
func addresses(n *agentv1.Network) []netip.Addr {
	var all []netip.Addr
	for _, dev := range n.GetInterfaces() {
		for _, a := range dev.GetAddresses() {
			if p, err := netip.ParsePrefix(a); err == nil { // the host's own words
				all = append(all, p.Addr())
			}
		}
	}
	return all
}
