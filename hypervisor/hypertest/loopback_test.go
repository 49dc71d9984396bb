package hypertest_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	"github.com/husk-containers/husk/protocols/stream"
)

func TestLoopbackConforms(t *testing.T) {
	hypertest.Conform(t, func(t *testing.T) hypertest.Subject {
		return hypertest.Subject{
			Hypervisor: &hypertest.Loopback{Guest: guest},
			Config: hypervisor.Config{
				ID: "test", Dir: t.TempDir(), VCPUs: 1, MemoryMiB: 64,
				Devices: []hypervisor.Device{hypervisor.Share{Tag: "husk", Dir: t.TempDir()}},
			},
			Port:  stream.Port,
			Greet: offer,
			Kill:  func(vm hypervisor.VM) { vm.(*hypertest.VM).Crash(hypervisor.ErrKilled) },
		}
	})
}

func TestLoopbackConformsWithNICs(t *testing.T) {
	hypertest.ConformNIC(t, func(t *testing.T) hypertest.NICSubject {
		end := make(chan *hypertest.GuestEnd, 1)
		var booted *hypertest.GuestEnd
		return hypertest.NICSubject{
			Hypervisor: &hypertest.Loopback{Guest: func(ctx context.Context, g *hypertest.GuestEnd) error {
				end <- g
				return guest(ctx, g)
			}},
			Config: hypervisor.Config{ID: "test", Dir: t.TempDir(), VCPUs: 1, MemoryMiB: 64},
			NIC: func(_ *testing.T, n byte) hypervisor.NIC {
				return hypervisor.NIC{ID: fmt.Sprintf("eth%d", n), MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}, MTU: 1500, Stream: os.Stdin}
			},
			Await: func(ctx context.Context, _ hypervisor.VM, mac net.HardwareAddr, there bool) error {
				if booted == nil {
					booted = <-end
				}
				return booted.AwaitDevices(ctx, func(devices []hypervisor.Device) bool {
					return there == slices.ContainsFunc(devices, func(d hypervisor.Device) bool {
						nic, ok := d.(hypervisor.NIC)
						return ok && nic.MAC.String() == mac.String()
					})
				})
			},
		}
	})
}

// offer presents a fresh token.
func offer(ctx context.Context, conn net.Conn) error {
	return stream.Offer(ctx, conn, stream.NewToken())
}

// guest does what the suite asks of one, as the agent does.
func guest(ctx context.Context, g *hypertest.GuestEnd) error {
	ln, err := g.Listen(stream.Port)
	if err != nil {
		return err
	}
	var work sync.WaitGroup
	defer work.Wait()
	defer ln.Close()
	control, err := g.DialControl(ctx)
	if err != nil {
		return err
	}
	work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				if _, err := stream.ReadToken(conn); err != nil || stream.Answer(conn, true) != nil {
					conn.Close()
				}
			})
		}
	})
	defer context.AfterFunc(ctx, func() { control.Close() })()
	io.Copy(io.Discard, control)
	return nil
}
