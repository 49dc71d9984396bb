package boot

import (
	"log/slog"
	"strings"
	"testing"
)

func TestParseParams(t *testing.T) {
	for _, tc := range []struct {
		cmdline string
		want    Params
		err     string
	}{
		{"console=ttyS0 quiet husk.channel=virtio-serial", Params{"virtio-serial", slog.LevelWarn}, ""},
		{"husk.channel=vsock:5000 husk.log=debug panic=-1\n", Params{"vsock:5000", slog.LevelDebug}, ""},
		{"husk.log=debug husk.log=info husk.channel=a husk.channel=b", Params{"b", slog.LevelInfo}, ""},
		{"husk.channel=a huskier=1 husk", Params{"a", slog.LevelWarn}, ""},
		{"quiet", Params{}, "husk.channel: missing"},
		{"husk.channel=a husk.log=loud", Params{}, "husk.log=loud"},
		{"husk.channel=a husk.novel=1", Params{}, "husk.novel: not known"},
	} {
		got, err := ParseParams(tc.cmdline)
		switch {
		case tc.err == "" && (err != nil || got != tc.want):
			t.Errorf("%q: %+v, %v", tc.cmdline, got, err)
		case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
			t.Errorf("%q: error %v, want %q", tc.cmdline, err, tc.err)
		}
	}
}

func TestSysctlPath(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.ip_forward":             "/proc/sys/net/ipv4/ip_forward",
		"net/ipv4/ip_forward":             "/proc/sys/net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/1.forwarding": "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
		"net/ipv4/conf/eth0.1/forwarding": "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
		"vm":                              "/proc/sys/vm",
	} {
		if got := sysctlPath(key); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}
