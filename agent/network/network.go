// Package network makes the guest's network what the host says it is.
package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// A Stack is the network stack of the network namespace that its methods are
// called in; the guest has one. It remembers what it has put there, and takes
// only that away again: what the kernel adds by itself, such as link-local
// addresses, and what a container with the right to do so has changed, stays.
type Stack struct {
	turn chan struct{} // holds one token while nobody sets the network

	// What follows is there, or may be: it is the holder's of the token.
	links      map[int]bool // by index
	addresses  map[address]bool
	routes     map[route]bool
	neighbours map[neighbour]bool
}

// New returns a Stack that has put nothing into the network yet.
func New() *Stack {
	s := &Stack{
		turn:       make(chan struct{}, 1),
		links:      make(map[int]bool),
		addresses:  make(map[address]bool),
		routes:     make(map[route]bool),
		neighbours: make(map[neighbour]bool),
	}
	s.turn <- struct{}{}
	return s
}

// SetNetwork makes the network what n, which is valid, says: interfaces that n
// names get their names, addresses and so on, and what is there by an earlier
// call and not in n is taken away. It waits, until ctx ends, for devices that
// have not appeared yet, and changes nothing before all have. The error is the
// first thing that cannot be done; what came before it stays, and the next call
// mends it. Calls are served one after the other.
func (s *Stack) SetNetwork(ctx context.Context, n *agentv1.Network) error {
	select {
	case <-s.turn:
		defer func() { s.turn <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("set network: %w", context.Cause(ctx))
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("set network: %w", err)
	}
	defer h.Close()
	if err := s.set(ctx, kernel{h}, n); err != nil {
		return fmt.Errorf("set network: %w", err)
	}
	return nil
}

func (s *Stack) set(ctx context.Context, k kernel, n *agentv1.Network) error {
	links, err := find(ctx, k.LinkList, n.GetInterfaces())
	if err != nil {
		return err
	}
	index := make(map[string]int, len(links))
	for i, dev := range n.GetInterfaces() {
		index[dev.GetName()] = links[i].Attrs().Index
	}
	want := resolve(n, index)
	if err := s.removeStale(k, want); err != nil {
		return err
	}
	if err := k.rename(n.GetInterfaces(), links); err != nil {
		return err
	}
	for i, dev := range n.GetInterfaces() {
		s.links[links[i].Attrs().Index] = true
		if err := k.configure(dev, links[i]); err != nil {
			return fmt.Errorf("interface %q: %w", dev.GetName(), err)
		}
	}
	if err := each(s.addresses, want.addresses, k.addAddress); err != nil {
		return err
	}
	if err := each(s.routes, want.routes, k.addRoute); err != nil {
		return err
	}
	return each(s.neighbours, want.neighbours, k.setNeighbour)
}

// each adds what is wanted, in order, and notes that it is there.
func each[T comparable](there map[T]bool, want []T, add func(T) error) error {
	for _, v := range want {
		there[v] = true
		if err := add(v); err != nil {
			return err
		}
	}
	return nil
}

// removeStale takes away what is not wanted any more. Routes come first: the
// kernel takes those with a source away together with that address.
func (s *Stack) removeStale(k kernel, want plan) error {
	err := errors.Join(
		stale(s.neighbours, want.neighbours, k.removeNeighbour),
		stale(s.routes, want.routes, k.removeRoute),
		stale(s.addresses, want.addresses, k.removeAddress),
	)
	if err != nil {
		return err
	}
	kept := make(map[int]bool)
	for _, i := range want.links {
		kept[i] = true
	}
	for i := range s.links {
		if kept[i] {
			continue
		}
		if err := k.setDown(i); err != nil {
			return err
		}
		delete(s.links, i)
	}
	return nil
}

func stale[T comparable](there map[T]bool, want []T, remove func(T) error) error {
	kept := make(map[T]bool, len(want))
	for _, v := range want {
		kept[v] = true
	}
	for v := range there {
		if kept[v] {
			continue
		}
		if err := remove(v); err != nil {
			return err
		}
		delete(there, v)
	}
	return nil
}
