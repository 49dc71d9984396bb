package hypervisor

import (
	"net"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func testNIC() NIC {
	return NIC{ID: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500, Taps: []*os.File{os.Stdin}}
}

func TestNICCheck(t *testing.T) {
	file := os.Stdin
	for want, change := range map[string]func(*NIC){
		"":                                      func(*NIC) {},
		"its id is not":                         func(n *NIC) { n.ID = "Eth_0" },
		`"" has 0 bytes`:                        func(n *NIC) { n.MAC = nil },
		"has 8 bytes":                           func(n *NIC) { n.MAC = make(net.HardwareAddr, 8) },
		"01:00:5e:00:00:01 is a multicast":      func(n *NIC) { n.MAC = net.HardwareAddr{1, 0, 0x5e, 0, 0, 1} },
		"00:00:00:00:00:00 is no address":       func(n *NIC) { n.MAC = make(net.HardwareAddr, 6) },
		"MTU 67 is not":                         func(n *NIC) { n.MTU = 67 },
		"MTU 65536 is not":                      func(n *NIC) { n.MTU = 65536 },
		"neither taps nor a stream":             func(n *NIC) { n.Taps = nil },
		"both taps and a stream":                func(n *NIC) { n.Stream = file },
		"2 vhost descriptors for 1 taps":        func(n *NIC) { n.Vhost = []*os.File{file, file} },
		"1 vhost descriptors for 0 taps":        func(n *NIC) { n.Taps, n.Stream, n.Vhost = nil, file, []*os.File{file} },
		"MTU 0 is not between 68 and 65535, it": func(n *NIC) { n.MTU, n.Taps = 0, nil },
	} {
		t.Run(want, func(t *testing.T) {
			n := testNIC()
			change(&n)
			err := n.Check(nil)
			switch {
			case want == "" && err != nil:
				t.Error(err)
			case want != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n")):
				t.Errorf("got %v, want one line with %q", err, want)
			}
		})
	}
}

func TestNICCheckAgainstOthers(t *testing.T) {
	n := testNIC()
	sameID, sameMAC, other := n, n, n
	sameID.MAC = net.HardwareAddr{2, 0, 0, 0, 0, 2}
	sameMAC.ID = "eth1"
	other.ID, other.MAC = "eth1", net.HardwareAddr{2, 0, 0, 0, 0, 2}
	if err := n.Check([]NIC{other}); err != nil {
		t.Error(err)
	}
	for want, o := range map[string]NIC{"the id is taken": sameID, `is that of "eth1"`: sameMAC} {
		if err := n.Check([]NIC{o}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want that %s", err, want)
		}
	}
}
