package qemu

import (
	"context"
	"net"
	"os"
	"testing"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/channel"
	"github.com/husk-containers/husk/hypervisor/hypertest"
	"github.com/husk-containers/husk/protocols/stream"
)

// guestKernel and guestImage hold the real agent.
const (
	guestKernel = "../../build/guest/vmlinuz"
	guestImage  = "../../build/guest/initrd.img"
)

func TestConformance(t *testing.T) {
	for _, kind := range []string{"virtio-serial", "vhost-vsock"} {
		t.Run(kind, func(t *testing.T) {
			if kind == "vhost-vsock" {
				if err := channel.VsockUsable(); err != nil {
					t.Skip(err)
				}
			}
			hypertest.Conform(t, func(t *testing.T) hypertest.Subject {
				q, cfg := realQEMU(t)
				if _, err := os.Stat(guestImage); err != nil {
					t.Skipf("no guest image: %v; run make guest", err)
				}
				q.Channels = []string{kind}
				cfg.Kernel, cfg.Initrd = guestKernel, guestImage
				return hypertest.Subject{
					Hypervisor: q, Config: cfg, Port: stream.Port,
					Greet: offerToken,
				}
			})
		})
	}
}

func offerToken(ctx context.Context, conn net.Conn) error {
	return stream.Offer(ctx, conn, stream.NewToken())
}

func TestNICConformance(t *testing.T) {
	for _, kind := range []string{"virtio-serial", "vhost-vsock"} {
		t.Run(kind, func(t *testing.T) {
			if kind == "vhost-vsock" {
				if err := channel.VsockUsable(); err != nil {
					t.Skip(err)
				}
			}
			hypertest.ConformNIC(t, func(t *testing.T) hypertest.NICSubject {
				q, cfg := testGuest(t, kind)
				ns := newNamespace(t)
				return hypertest.NICSubject{
					Hypervisor: q, Config: cfg,
					NIC: func(t *testing.T, n byte) hypervisor.NIC { return ns.onTap(t, n, 1) },
					Await: func(ctx context.Context, vm hypervisor.VM, mac net.HardwareAddr, there bool) error {
						line := "gone %s"
						if there {
							line = "up %s 10.1.1.1/32"
						}
						_, err := tell(ctx, vm, line, mac)
						return err
					},
				}
			})
		})
	}
}
