package hypervisor

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	// MinMTU and MaxMTU of a NIC: what IPv4 asks of every link (RFC 791), and what
	// the field for it in virtio-net's configuration holds.
	MinMTU = 68
	MaxMTU = 65535
)

var validNIC = regexp.MustCompile(`^[a-z0-9-]{1,32}$`)

// Check tells whether a VM that has the NICs others can have n too. The error says
// in one line all that is wrong with n itself, an errdefs.ErrInvalidArgument, or
// that its ID or its MAC is taken, an errdefs.ErrAlreadyExists.
func (n NIC) Check(others []NIC) error {
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if !validNIC.MatchString(n.ID) {
		bad("its id is not 1 to 32 of a-z, 0-9 and '-'")
	}
	switch {
	case len(n.MAC) != 6:
		bad("its MAC address %q has %d bytes, want 6", n.MAC, len(n.MAC))
	case n.MAC[0]&1 != 0:
		bad("its MAC address %s is a multicast address", n.MAC)
	case bytes.Equal(n.MAC, make([]byte, 6)):
		bad("its MAC address %s is no address", n.MAC)
	}
	if n.MTU < MinMTU || n.MTU > MaxMTU {
		bad("its MTU %d is not between %d and %d", n.MTU, MinMTU, MaxMTU)
	}
	switch {
	case n.Stream == nil && len(n.Taps) == 0:
		bad("it has neither taps nor a stream")
	case n.Stream != nil && len(n.Taps) > 0:
		bad("it has both taps and a stream")
	}
	if len(n.Vhost) != 0 && len(n.Vhost) != len(n.Taps) {
		bad("it has %d vhost descriptors for %d taps", len(n.Vhost), len(n.Taps))
	}
	if wrong != nil {
		return fmt.Errorf("network interface %q: %s: %w", n.ID, strings.Join(wrong, ", "), errdefs.ErrInvalidArgument)
	}
	for _, o := range others {
		if o.ID == n.ID {
			return fmt.Errorf("network interface %q: the id is taken: %w", n.ID, errdefs.ErrAlreadyExists)
		}
		if bytes.Equal(o.MAC, n.MAC) {
			return fmt.Errorf("network interface %q: its MAC address %s is that of %q: %w", n.ID, n.MAC, o.ID, errdefs.ErrAlreadyExists)
		}
	}
	return nil
}
