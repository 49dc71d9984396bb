package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/husk-containers/husk/hypervisor"
)

const (
	// nicBus is the bridge that NICs are plugged into, from the start or later:
	// q35's root bus takes no device while the guest runs.
	nicBus = "nics"
	// maxNICs is how many slots the bridge has: 32 (PCI-to-PCI Bridge Architecture
	// Specification 1.2), without the first, which is a controller's.
	maxNICs = 31
	// memorySlot is that first slot, which is free without a controller: it takes the
	// device for memory.
	memorySlot = "0"
)

// bridge is the device that nicBus is. ACPI does the hot-plug; without a
// controller for it the firmware needs telling that there must be room for devices
// to come: 4 KiB and 16 KiB for each.
const bridge = "pci-bridge,id=" + nicBus + ",chassis_nr=1,shpc=off,mem-reserve=1M,pref64-reserve=1M,io-reserve=0"

// A netdev is the host's half of a NIC, for -netdev and netdev_add alike.
type netdev struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	// FD and FDs name descriptors; FDs and VhostFDs are lists separated by ':'.
	FD       string `json:"fd,omitempty"`
	FDs      string `json:"fds,omitempty"`
	Vhost    bool   `json:"vhost,omitempty"`
	VhostFDs string `json:"vhostfds,omitempty"`
}

// A nicDevice is the guest's half of a NIC, for -device and device_add alike.
type nicDevice struct {
	Driver  string `json:"driver"`
	ID      string `json:"id"`
	Netdev  string `json:"netdev"`
	Bus     string `json:"bus"`
	Addr    string `json:"addr"` // the slot, hexadecimal
	MAC     string `json:"mac"`
	HostMTU int    `json:"host_mtu"`
	// Romfile is empty: no firmware boots from the network.
	Romfile       string `json:"romfile"`
	DisableLegacy string `json:"disable-legacy"`
	MQ            bool   `json:"mq,omitempty"`
	Vectors       int    `json:"vectors,omitempty"`
}

// deviceID and netdevID name a NIC's halves. QEMU's ids begin with a letter.
func deviceID(nic string) string { return "nic-" + nic }
func netdevID(nic string) string { return "net-" + nic }

// nicFiles are the descriptors of a NIC in the order in which nicHalves names
// them.
func nicFiles(n hypervisor.NIC) []*os.File {
	if n.Stream != nil {
		return []*os.File{n.Stream}
	}
	return append(append([]*os.File(nil), n.Taps...), n.Vhost...)
}

// nicHalves describes n in a slot of nicBus, with a name for each of nicFiles: a
// number on the command line, or what it was passed as over QMP.
func nicHalves(n hypervisor.NIC, slot int, names []string) (netdev, nicDevice) {
	host := netdev{ID: netdevID(n.ID)}
	guest := nicDevice{
		Driver: "virtio-net-pci", ID: deviceID(n.ID), Netdev: host.ID, Bus: nicBus, Addr: strconv.FormatInt(int64(slot), 16),
		MAC: n.MAC.String(), HostMTU: n.MTU, DisableLegacy: "on",
	}
	if n.Stream != nil {
		// Not "stream", which has the same framing: QEMU 7.2 opens that one in
		// another thread, where the name of a passed descriptor means nothing.
		host.Type, host.FD = "socket", names[0]
		return host, guest
	}
	taps := len(n.Taps)
	host.Type, host.FDs = "tap", strings.Join(names[:taps], ":")
	host.Vhost, host.VhostFDs = len(n.Vhost) > 0, strings.Join(names[taps:], ":")
	if taps > 1 {
		// A vector for each receive and each transmit queue, for control and
		// for configuration.
		guest.MQ, guest.Vectors = true, 2*taps+2
	}
	return host, guest
}

// nicArgs are the arguments for n in a slot of nicBus, with its descriptors as
// QEMU numbers them.
func nicArgs(n hypervisor.NIC, slot int, fds []int) ([]string, error) {
	if want := len(nicFiles(n)); len(fds) != want {
		return nil, fmt.Errorf("network interface %q has %d descriptors of %d", n.ID, len(fds), want)
	}
	names := make([]string, len(fds))
	for i, fd := range fds {
		names[i] = strconv.Itoa(fd)
	}
	host, guest := nicHalves(n, slot, names)
	var args []string
	for _, half := range []struct {
		option string
		value  any
	}{{"-netdev", host}, {"-device", guest}} {
		value, err := json.Marshal(half.value)
		if err != nil {
			return nil, fmt.Errorf("network interface %q: %w", n.ID, err)
		}
		args = append(args, half.option, string(value))
	}
	return args, nil
}
