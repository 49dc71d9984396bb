package qemu

import (
	"errors"
	"testing"

	"github.com/husk-containers/husk/hypervisor"
)

func usable() error   { return nil }
func unusable() error { return errors.New("cause; remedy") }

func TestAccelerator(t *testing.T) {
	for _, tt := range []struct {
		wanted string
		usable func() error
		want   hypervisor.Capability
	}{
		{"auto", usable, hypervisor.Capability{Value: "kvm"}},
		{"auto", unusable, hypervisor.Capability{Value: "tcg", Reason: "cause; remedy"}},
		{"kvm", usable, hypervisor.Capability{Value: "kvm"}},
		{"kvm", unusable, hypervisor.Capability{Reason: `hypervisor.accelerator is "kvm" but KVM is not usable: cause; remedy, or set it to "auto"`}},
		{"tcg", usable, hypervisor.Capability{Value: "tcg"}},
		{"tcg", unusable, hypervisor.Capability{Value: "tcg"}},
	} {
		if got := New(Options{Accelerator: tt.wanted}).accelerator(tt.usable); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.wanted, got, tt.want)
		}
	}
}

func TestChannel(t *testing.T) {
	const vsock, serial = "vhost-vsock", "virtio-serial"
	for _, tt := range []struct {
		allowed []string
		usable  func() error
		want    hypervisor.Capability
	}{
		{[]string{vsock, serial}, usable, hypervisor.Capability{Value: vsock}},
		{[]string{vsock, serial}, unusable, hypervisor.Capability{Value: serial, Reason: "cause; remedy"}},
		{[]string{vsock}, unusable, hypervisor.Capability{Reason: `no way to the guest: cause; remedy, or allow "virtio-serial" in hypervisor.channels`}},
		{[]string{serial}, unusable, hypervisor.Capability{Value: serial}},
		{[]string{serial, vsock}, usable, hypervisor.Capability{Value: serial}},
		{nil, usable, hypervisor.Capability{Reason: "no way to the guest is allowed; allow one in hypervisor.channels"}},
	} {
		if got := New(Options{Channels: tt.allowed}).channel(tt.usable); got != tt.want {
			t.Errorf("%v: got %+v, want %+v", tt.allowed, got, tt.want)
		}
	}
}
