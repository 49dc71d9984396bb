package check

import (
	"context"
	"errors"
	"net"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/virtcontainers/usernet"
)

func tun(usable func() error) Result {
	if err := usable(); err != nil {
		return Result{Warn, "tun", "pods have no network: " + err.Error()}
	}
	return Result{OK, "tun", "/dev/net/tun"}
}

func vhostNet(use config.VhostNet, usable func() error) Result {
	const name = "vhost-net"
	if use == config.VhostNetNever {
		return Result{OK, name, `not used: network.vhost_net is "never"`}
	}
	if err := usable(); err != nil {
		return Result{Warn, name, "QEMU copies packets, which is slower: " + err.Error()}
	}
	return Result{OK, name, "/dev/vhost-net"}
}

func forward(wanted bool, usable func() error) Result {
	const name = "nftables"
	if !wanted {
		return Result{OK, name, "not used: network.port_forward is false"}
	}
	if err := usable(); err != nil {
		return Result{Warn, name, "port-forward to pods does not work: " + err.Error()}
	}
	return Result{OK, name, "redirects"}
}

// passt checks that one starts. It reports what does not work without.
func passt(n config.Network, starts func(path string) error) Result {
	const name = "passt"
	if !n.NeedsPasst() {
		return Result{OK, name, "not used: no pod gets user-mode networking"}
	}
	path, err := n.Passt, error(nil)
	if path == "" {
		path, err = usernet.Find()
	}
	if err == nil {
		err = starts(path)
	}
	if err == nil {
		return Result{OK, name, path}
	}
	meaning := "pods on the host's network do not start: "
	if n.HostNetwork != config.HostNetworkUser {
		meaning = "containers in an unconfigured network namespace do not start: "
	}
	return Result{Warn, name, meaning + err.Error()}
}

// passtStarts starts the passt at path as for a guest, and ends it.
func passtStarts(ctx context.Context, path string) error {
	n, err := usernet.Start(ctx, usernet.Options{Passt: path, MAC: net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}})
	if err != nil {
		return err
	}
	return errors.Join(n.Close(ctx), n.Err())
}
