package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// find returns the links that devs name by their MAC addresses, in their order.
// It waits, until ctx ends, for those that are not there: the kernel tells of
// every link that comes, so none is missed between two looks at the list.
func find(ctx context.Context, all func() ([]netlink.Link, error), devs []*agentv1.Interface) ([]netlink.Link, error) {
	events, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("watch interfaces: %w", err)
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, events.Close)
	defer stop()
	for {
		links, err := list(all)
		if err != nil {
			return nil, err
		}
		found, missing := match(links, devs)
		if len(missing) == 0 {
			return found, nil
		}
		if _, _, err := events.Receive(); ctx.Err() != nil {
			return nil, fmt.Errorf("wait for devices %s: %w", strings.Join(missing, ", "), context.Cause(ctx))
		} else if err != nil && !errors.Is(err, unix.ENOBUFS) { // else events were lost, and one look makes up for all
			return nil, fmt.Errorf("watch interfaces: %w", err)
		}
	}
}

// list lists all links; a list that changed under way is read again.
func list(all func() ([]netlink.Link, error)) ([]netlink.Link, error) {
	for {
		links, err := all()
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
		return links, nil
	}
}

// match finds the link of each of devs, and names those that have none.
func match(links []netlink.Link, devs []*agentv1.Interface) (found []netlink.Link, missing []string) {
	for _, dev := range devs {
		mac, err := net.ParseMAC(dev.GetMac())
		var best netlink.Link
		for _, l := range links {
			if err == nil && bytes.Equal(hardwareAddr(l), mac) && (best == nil || l.Attrs().Index < best.Attrs().Index) {
				best = l
			}
		}
		if best == nil {
			missing = append(missing, fmt.Sprintf("%q (MAC address %s)", dev.GetName(), dev.GetMac()))
		}
		found = append(found, best)
	}
	return found, missing
}

// hardwareAddr is the address that a device came with, or what it has where the
// kernel knows of no such. What a container has stacked on a device, a VLAN or a
// bridge say, may have that one's address; it has a higher index.
func hardwareAddr(l netlink.Link) net.HardwareAddr {
	if perm := l.Attrs().PermHWAddr; len(perm) > 0 {
		return perm
	}
	return l.Attrs().HardwareAddr
}
