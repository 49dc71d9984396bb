package qemu

import (
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
)

// slots are those of nicBus and the NICs in them. The zero value is empty.
type slots struct {
	mu   sync.Mutex
	nics []*plugged
}

// A plugged is a NIC in its slot.
//
//	reserve ──> plugged ── asked ──> gone ── release
type plugged struct {
	hypervisor.NIC
	slot int // 1 to maxNICs
	// asked tells that the guest was asked to let go of the device; its slots' lock
	// guards it.
	asked bool
	// gone is closed when it has.
	gone chan struct{}
}

// reserve gives n a slot, after Check. errdefs.ErrResourceExhausted where none is
// free.
func (s *slots) reserve(n hypervisor.NIC) (*plugged, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var others []hypervisor.NIC
	var taken [maxNICs + 1]bool
	for _, p := range s.nics {
		others = append(others, p.NIC)
		taken[p.slot] = true
	}
	if err := n.Check(others); err != nil {
		return nil, err
	}
	for slot := 1; slot <= maxNICs; slot++ {
		if !taken[slot] {
			p := &plugged{NIC: n, slot: slot, gone: make(chan struct{})}
			s.nics = append(s.nics, p)
			return p, nil
		}
	}
	return nil, fmt.Errorf("network interface %q: a VM has at most %d: %w", n.ID, maxNICs, errdefs.ErrResourceExhausted)
}

// find returns the NIC of that id, or nil.
func (s *slots) find(id string) *plugged {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.nics {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// ask notes whether the guest is asked to let go of p, and returns whether it was
// before.
func (s *slots) ask(p *plugged, asked bool) (before bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before, p.asked = p.asked, asked
	return before
}

// lost notes that the guest has let go of a device, by QEMU's id for it.
func (s *slots) lost(device string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.nics {
		if deviceID(p.ID) != device {
			continue
		}
		select {
		case <-p.gone:
		default:
			close(p.gone)
		}
	}
}

// release frees p's slot. It is idempotent.
func (s *slots) release(p *plugged) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nics = slices.DeleteFunc(s.nics, func(o *plugged) bool { return o == p })
}
