package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/hypervisor/qemu/qmp"
)

// Attach implements hypervisor.VM, for a NIC.
func (v *vm) Attach(ctx context.Context, d hypervisor.Device) error {
	nic, ok := d.(hypervisor.NIC)
	if !ok {
		return fmt.Errorf("attach a %T: no such device can be plugged into a running VM: %w", d, errdefs.ErrNotImplemented)
	}
	p, err := v.nics.reserve(nic)
	if err != nil {
		return fmt.Errorf("attach %w", err)
	}
	if err := v.plug(ctx, p); err != nil {
		err = fmt.Errorf("attach network interface %q: %w", nic.ID, v.whyNot(err))
		// ctx may be what ended it, and QEMU may yet carry out what it was told.
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseStep)
		defer cancel()
		return errors.Join(err, v.unplug(undo, p))
	}
	return nil
}

// Detach implements hypervisor.VM. After an error it may be called again: the
// guest stays asked.
func (v *vm) Detach(ctx context.Context, id string) error {
	p := v.nics.find(id)
	if p == nil {
		return nil
	}
	if err := v.unplug(ctx, p); err != nil {
		return fmt.Errorf("detach network interface %q: %w", id, err)
	}
	return nil
}

// plug passes the NIC's files to QEMU and makes both its halves. What was made is
// left to unplug, the files excepted.
func (v *vm) plug(ctx context.Context, p *plugged) error {
	files := nicFiles(p.NIC)
	names := make([]string, len(files))
	for i := range files {
		names[i] = fmt.Sprintf("%s-%d", netdevID(p.ID), i)
	}
	host, guest := nicHalves(p.NIC, p.slot, names)
	if err := v.passFiles(ctx, files, names, host); err != nil {
		return err
	}
	return v.qmp.Execute(ctx, "device_add", guest, nil)
}

// passFiles makes the host's half of a NIC on files.
func (v *vm) passFiles(ctx context.Context, files []*os.File, names []string, host netdev) error {
	for i, f := range files {
		err := v.qmp.ExecuteFile(ctx, "getfd", map[string]string{"fdname": names[i]}, nil, f)
		if err != nil {
			v.dropFiles(ctx, names[:i+1])
			return err
		}
	}
	if err := v.qmp.Execute(ctx, "netdev_add", host, nil); err != nil {
		v.dropFiles(ctx, names)
		return err
	}
	return nil
}

// dropFiles has QEMU close the descriptors that no device took.
func (v *vm) dropFiles(ctx context.Context, names []string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseStep)
	defer cancel()
	for _, name := range names {
		// It may have been taken, and closed with what took it.
		v.qmp.Execute(ctx, "closefd", map[string]string{"fdname": name}, nil) //nolint:errcheck // see above
	}
}

// unplug takes out both halves of a NIC, as far as they are there, and frees its
// slot. On error it can be called again.
func (v *vm) unplug(ctx context.Context, p *plugged) error {
	before := v.nics.ask(p, true)
	err := v.qmp.Execute(ctx, "device_del", map[string]string{"id": deviceID(p.ID)}, nil)
	var refused *qmp.Error
	switch {
	case errdefs.IsNotFound(err): // never made, or gone
	case err == nil, before && errors.As(err, &refused): // it refuses what is under way
		select {
		case <-p.gone:
		case <-v.done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("the guest has not let go of the device: %w", context.Cause(ctx))
		}
	case errors.As(err, &refused):
		v.nics.ask(p, false)
		return err
	default:
		return v.unlessEnded(err)
	}
	err = v.qmp.Execute(ctx, "netdev_del", map[string]string{"id": netdevID(p.ID)}, nil)
	if err != nil && !errdefs.IsNotFound(err) {
		return v.unlessEnded(err)
	}
	v.nics.release(p)
	return nil
}

// unlessEnded is err, or nil where the VM has ended and its devices with it.
func (v *vm) unlessEnded(err error) error {
	err = v.whyNot(err)
	select {
	case <-v.done:
		return nil
	default:
		return err
	}
}

// whyNot is err, or why the VM ended where that is what is behind it.
func (v *vm) whyNot(err error) error {
	if errdefs.IsUnavailable(err) {
		return v.because(err)
	}
	return err
}

// watch takes QEMU's events until the connection ends.
func (v *vm) watch() {
	defer close(v.watched)
	for e := range v.qmp.Events() {
		v.cpus.Event(e)
		v.memory.Event(e)
		var data struct {
			Device string `json:"device"`
		}
		if e.Name != "DEVICE_DELETED" || json.Unmarshal(e.Data, &data) != nil || data.Device == "" {
			continue
		}
		v.nics.lost(data.Device)
	}
}
