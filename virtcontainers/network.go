package virtcontainers

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
	"github.com/husk-containers/husk/virtcontainers/forward"
	"github.com/husk-containers/husk/virtcontainers/guest"
	"github.com/husk-containers/husk/virtcontainers/network"
	"github.com/husk-containers/husk/virtcontainers/usernet"
)

// A guestNetwork is what a guest reaches others by.
type guestNetwork struct {
	nics []hypervisor.NIC
	told *agentv1.Network
	// given is the network of a given namespace, nil where there is none.
	given *network.Network
	// ports take connections to the host in the guest's stead, where it has the
	// host's network.
	ports *forward.HostPorts
}

// connect makes the sandbox's network on the host, before its VM.
//
//	spec asks for               the guest gets
//	a given namespace           its interfaces, and connections made inside it
//	a new namespace             loopback; user-mode networking where configured
//	no namespace: the host's    user-mode networking, and its ports on the host
func (s *Sandbox) connect(ctx context.Context) (*guestNetwork, error) {
	cfg := s.config.Network
	switch {
	case s.network.Path != "":
		return s.connectNamespace(ctx)
	case s.network.Host && cfg.HostNetwork == config.HostNetworkRefuse:
		return nil, fmt.Errorf("linux.namespaces has no network namespace, which asks for the host's network, "+
			"and the configuration's network.host_network is %q: give the pod a network of its own, or set that to %q: %w",
			cfg.HostNetwork, config.HostNetworkUser, errdefs.ErrFailedPrecondition)
	case s.network.Host:
		return s.connectUser(ctx, true)
	case cfg.UnconfiguredNetwork == config.UnconfiguredNetworkUser:
		return s.connectUser(ctx, false)
	}
	return &guestNetwork{}, nil
}

func (s *Sandbox) connectNamespace(ctx context.Context) (*guestNetwork, error) {
	n, err := network.Open(ctx, s.network.Path, network.Options{
		Queues: s.config.Hypervisor.DefaultVCPUs, VhostNet: s.config.Network.VhostNet == config.VhostNetAuto, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	s.undo.Push("close the network", hostStep, func(context.Context) error { return n.Close() })
	if s.config.Network.PortForward {
		pf, err := forward.Open(ctx, n.NS(), s.guest.Dial, s.log)
		if err != nil {
			// Pods are of use without.
			s.log.Warn("connections made inside the pod's network namespace, port-forward's among them, do not reach the guest", "err", err)
		} else {
			s.undo.Push("close port-forward", hostStep, func(context.Context) error { return pf.Close() })
		}
	}
	return &guestNetwork{nics: n.NICs(), told: n.Guest(), given: n}, nil
}

func (s *Sandbox) connectUser(ctx context.Context, host bool) (*guestNetwork, error) {
	u, err := usernet.Start(ctx, usernet.Options{
		Passt: s.config.Network.Passt, MAC: randomMAC(),
		Started: func(p hypervisor.Process) error { return s.record.Add(p.Name, p.PID) },
	})
	if err != nil {
		return nil, err
	}
	s.undo.Push("end user-mode networking", hostStep, u.Close)
	s.spawn(func() { s.watchUser(u) })
	gn := &guestNetwork{nics: []hypervisor.NIC{u.NIC()}, told: u.Guest()}
	if host {
		gn.ports = forward.NewHostPorts(s.guest.Dial, guestAddresses(gn.told), s.log)
		s.undo.Push("close the guest's ports on the host", hostStep, func(context.Context) error { return gn.ports.Close() })
	}
	return gn, nil
}

// watchUser fails the sandbox when its user-mode network ends. Of itself that ends
// with the VM, which then has its own reason to tell.
func (s *Sandbox) watchUser(u *usernet.Network) {
	select {
	case <-u.Done():
	case <-s.watchCtx.Done():
		return
	}
	if !u.Killed() {
		grace := time.NewTimer(guest.LostAgentGrace)
		defer grace.Stop()
		select {
		case <-s.guest.Dead():
			return
		case <-grace.C:
		}
	}
	if err := u.Err(); err != nil {
		s.guest.Fail(err)
	}
}

// followNetwork carries changes of the given namespace to the guest.
func (s *Sandbox) followNetwork(n *network.Network) {
	if err := s.guest.Await(s.watchCtx); err != nil {
		return
	}
	n.CloseFiles()
	if err := n.Watch(s.watchCtx, s.changeNetwork); err != nil {
		s.log.Error("changes of the pod's network namespace are not followed any more", "err", err)
	}
}

// changeNetwork makes one change in the guest. What cannot be made is logged: there
// is nobody who waits for it.
func (s *Sandbox) changeNetwork(ctx context.Context, c network.Change) {
	for _, nic := range c.Added {
		if err := s.guest.Attach(ctx, nic); err != nil {
			s.log.Error("give the guest a network interface", "mac", nic.MAC, "err", err)
			return
		}
	}
	err := s.guest.Call(ctx, func(ctx context.Context, a agentv1.AgentClient) error {
		_, err := a.UpdateNetwork(ctx, &agentv1.UpdateNetworkRequest{Network: c.Guest})
		return err
	})
	if err != nil && !s.guest.Lost(err) {
		s.log.Error("change the guest's network", "err", err)
	}
	for _, id := range c.Removed {
		if err := s.guest.Detach(ctx, id); err != nil && !s.guest.Lost(err) {
			s.log.Error("take a network interface from the guest", "nic", id, "err", err)
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

// guestAddresses are the guest's own but loopback.
func guestAddresses(n *agentv1.Network) []netip.Addr {
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
