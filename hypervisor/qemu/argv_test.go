package qemu

import (
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/husk-containers/husk/hypervisor"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func testMachine() machine {
	return machine{
		Config: hypervisor.Config{
			ID: "demo", VCPUs: 2, MemoryMiB: 256, KernelParams: " husk.log=warn  debug ",
			Devices: []hypervisor.Device{hypervisor.Share{Tag: "husk", Dir: "/s"}},
		},
		machineType: "q35", accelerator: "tcg", qmpFD: 3, consoleFD: 4, kernelFD: 7, initrdFD: 8,
		channel:  channelDevice{fd: 5, param: "husk.channel=virtio-serial"},
		shareFDs: []int{6},
	}
}

func TestArgvGolden(t *testing.T) {
	for name, change := range map[string]func(*machine){
		"tcg-serial": func(*machine) {},
		"tcg-room": func(m *machine) {
			m.MaxVCPUs, m.MaxMemoryMiB, m.freePageReporting = 4, 1000, true
		},
		"kvm-room-on-a-node": func(m *machine) {
			node := 1
			m.accelerator, m.MemoryNode = "kvm", &node
			m.MaxVCPUs, m.MaxMemoryMiB = 4, 1000
		},
		"kvm-vsock": func(m *machine) {
			m.accelerator = "kvm"
			m.channel = channelDevice{fd: 5, cid: 4711, param: "husk.channel=vsock:1024"}
		},
		"cpu-model-two-shares": func(m *machine) {
			m.cpuModel = "EPYC"
			m.Devices = append(m.Devices, hypervisor.Share{Tag: "data", Dir: "/d"})
			m.shareFDs = append(m.shareFDs, 7)
		},
		"nics": func(m *machine) {
			file := os.Stdin
			queues, stream := testNIC(2), testNIC(3)
			queues.Taps, queues.Vhost = []*os.File{file, file}, []*os.File{file, file}
			stream.Taps, stream.Stream, stream.MTU = nil, file, 65520
			m.Devices = append(m.Devices, testNIC(1), queues, stream)
			m.nicFDs = [][]int{{9}, {10, 11, 12, 13}, {14}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := testMachine()
			change(&m)
			args, err := argv(m)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(args, "\n") + "\n"
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("arguments differ from %s:\n%s", golden, got)
			}
		})
	}
}

// testNIC has one tap.
func testNIC(n byte) hypervisor.NIC {
	return hypervisor.NIC{
		ID: fmt.Sprintf("eth%d", n), MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}, MTU: 1500, Taps: []*os.File{os.Stdin},
	}
}

// alien stands for a device kind that this backend does not have.
type alien struct{ hypervisor.Share }

func TestArgvRefusesWhatIsInvalid(t *testing.T) {
	for want, change := range map[string]func(*machine){
		`id "a b"`:                   func(m *machine) { m.ID = "a b" },
		"0 vCPUs":                    func(m *machine) { m.VCPUs = 0 },
		"8 MiB of memory":            func(m *machine) { m.MemoryMiB = 8 },
		`machine type "pc"`:          func(m *machine) { m.machineType = "pc" },
		`accelerator "hvf"`:          func(m *machine) { m.accelerator = "hvf" },
		`share tag "a,b"`:            func(m *machine) { m.Devices[0] = hypervisor.Share{Tag: "a,b"} },
		`share tag "husk" is taken`:  func(m *machine) { m.Devices = append(m.Devices, m.Devices[0]) },
		`share "husk" has no descri`: func(m *machine) { m.shareFDs = nil },
		"qemu.alien is of no kind":   func(m *machine) { m.Devices[0] = alien{} },
		`"eth1": its MTU 7 is not`: func(m *machine) {
			n := testNIC(1)
			n.MTU = 7
			m.Devices[0], m.nicFDs = n, [][]int{{9}}
		},
		`"eth1" has 0 descriptors of 1`: func(m *machine) { m.Devices[0] = testNIC(1) },
		`"eth1": the id is taken`: func(m *machine) {
			m.Devices, m.nicFDs = []hypervisor.Device{testNIC(1), testNIC(1)}, [][]int{{9}, {10}}
		},
		`"eth32": a VM has at most 31`: func(m *machine) {
			for n := range byte(maxNICs + 1) {
				m.Devices, m.nicFDs = append(m.Devices, testNIC(n+1)), append(m.nicFDs, []int{9})
			}
		},
	} {
		t.Run(want, func(t *testing.T) {
			m := testMachine()
			change(&m)
			args, err := argv(m)
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("argv: %v, %v; want one line with %q", args, err, want)
			}
		})
	}
}
