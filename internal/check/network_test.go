package check

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/virtcontainers/usernet"
)

func usable() error   { return nil }
func unusable() error { return errors.New("cause; remedy") }

func TestDevicesAndNFTables(t *testing.T) {
	for _, tt := range []struct {
		got, want Result
	}{
		{tun(usable), Result{OK, "tun", "/dev/net/tun"}},
		{tun(unusable), Result{Warn, "tun", "pods have no network: cause; remedy"}},
		{vhostNet(config.VhostNetAuto, usable), Result{OK, "vhost-net", "/dev/vhost-net"}},
		{vhostNet(config.VhostNetAuto, unusable), Result{Warn, "vhost-net", "QEMU copies packets, which is slower: cause; remedy"}},
		{vhostNet(config.VhostNetNever, unusable), Result{OK, "vhost-net", `not used: network.vhost_net is "never"`}},
		{forward(true, usable), Result{OK, "nftables", "redirects"}},
		{forward(true, unusable), Result{Warn, "nftables", "port-forward to pods does not work: cause; remedy"}},
		{forward(false, unusable), Result{OK, "nftables", "not used: network.port_forward is false"}},
	} {
		if tt.got != tt.want {
			t.Errorf("got %v, want %v", tt.got, tt.want)
		}
	}
}

func TestPasst(t *testing.T) {
	for _, tt := range []struct {
		name         string
		host         config.HostNetwork
		unconfigured config.UnconfiguredNetwork
		starts       error
		want         Result
	}{
		{"starts", config.HostNetworkUser, config.UnconfiguredNetworkNone, nil, Result{OK, "passt", "/p"}},
		{
			"does not start", config.HostNetworkUser, config.UnconfiguredNetworkUser, unusable(),
			Result{Warn, "passt", "pods on the host's network do not start: cause; remedy"},
		},
		{
			"does not start, and is for others", config.HostNetworkRefuse, config.UnconfiguredNetworkUser, unusable(),
			Result{Warn, "passt", "containers in an unconfigured network namespace do not start: cause; remedy"},
		},
		{
			"is not needed", config.HostNetworkRefuse, config.UnconfiguredNetworkNone, unusable(),
			Result{OK, "passt", "not used: no pod gets user-mode networking"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := config.Network{HostNetwork: tt.host, UnconfiguredNetwork: tt.unconfigured, Passt: "/p"}
			got := passt(n, func(path string) error {
				if path != "/p" {
					t.Errorf("started %q", path)
				}
				return tt.starts
			})
			if got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestPasstStarts(t *testing.T) {
	if err := passtStarts(t.Context(), "/nonexistent/passt"); err == nil || !strings.Contains(err.Error(), "install passt") {
		t.Errorf("got %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("another uid needs root")
	}
	path, err := usernet.Find()
	if err != nil {
		t.Skip(err)
	}
	if err := passtStarts(t.Context(), path); err != nil {
		t.Error(err)
	}
}
