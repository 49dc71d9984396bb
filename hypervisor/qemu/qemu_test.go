package qemu

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/husk-containers/husk/hypervisor"
)

// bootTimeout suits TCG on a busy machine.
const bootTimeout = 2 * time.Minute

// realQEMU returns a backend and the configuration of a VM whose kernel finds no
// init and panics, or skips.
func realQEMU(t *testing.T) (*QEMU, hypervisor.Config) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a real VM")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to run QEMU as another user")
	}
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("QEMU is not installed")
	}
	kernels, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(kernels) == 0 {
		t.Skip("no Debian cloud kernel in /boot")
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	// An archive of nothing but its end: newc, 13 fields of 8 hex digits.
	trailer := "070701" + strings.Repeat("0", 11*8) + "0000000B" + "00000000" + "TRAILER!!!\x00"
	trailer += strings.Repeat("\x00", (4-len(trailer)%4)%4)
	if err := os.WriteFile(initrd, []byte(trailer), 0o644); err != nil {
		t.Fatal(err)
	}
	q := New(Options{
		Path: path, Accelerator: "auto", Channels: []string{"virtio-serial"}, Machine: "q35", VirtiofsdCache: "auto",
		Log: slog.New(slog.DiscardHandler),
	})
	return q, hypervisor.Config{
		ID: "test", Dir: t.TempDir(), VCPUs: 1, MemoryMiB: 128, Kernel: kernels[len(kernels)-1], Initrd: initrd,
		Devices: []hypervisor.Device{hypervisor.Share{Tag: "husk", Dir: t.TempDir()}},
	}
}

func TestGuestPanicIsTheReason(t *testing.T) {
	q, cfg := realQEMU(t)
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	v, err := q.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Stop(ctx) //nolint:errcheck // nothing to stop
	_, err = v.Accept(ctx)
	if err == nil || !strings.Contains(err.Error(), "panicked") || !strings.Contains(err.Error(), "root") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Accept: %v, want the panic in one line; console %q", err, v.(*vm).console.tail())
	}
	if got := v.Err(); got == nil || !errors.Is(err, got) {
		t.Errorf("Err: %v, want the reason Accept gave", got)
	}
}

func TestQEMUIsConfinedAndItsDeathIsTheReason(t *testing.T) {
	q, cfg := realQEMU(t)
	cfg.KernelParams = "panic=0" // stay
	var mu sync.Mutex
	pids := map[string]int{}
	cfg.Started = func(p hypervisor.Process) error {
		mu.Lock()
		defer mu.Unlock()
		pids[p.Name] = p.PID
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	v, err := q.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Stop(ctx) //nolint:errcheck // it ends below
	if pids["qemu"] != v.PID() || pids["virtiofsd"] == 0 {
		t.Errorf("processes told of: %v, PID %d", pids, v.PID())
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(v.PID()) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status of QEMU lacks %q:\n%s", want, status)
		}
	}
	if groups := regexp.MustCompile(`(?m)^Groups:\t(.*)$`).FindSubmatch(status); groups == nil || len(strings.Fields(string(groups[1]))) > 1 {
		t.Errorf("QEMU has the supplementary groups %q, want none but KVM's", groups)
	}
	limits, err := os.ReadFile("/proc/" + strconv.Itoa(v.PID()) + "/limits")
	if err != nil || !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("QEMU may dump core: %v\n%s", err, limits)
	}
	if uid := regexp.MustCompile(`(?m)^Uid:\t(\d+)`).FindSubmatch(status); uid == nil || len(uid[1]) != len("1879048192") {
		t.Errorf("QEMU runs as uid %q, want one of its own", uid)
	}
	for _, ns := range []string{"net", "pid", "ipc", "uts"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink("/proc/" + strconv.Itoa(v.PID()) + "/ns/" + ns)
		if err := errors.Join(err1, err2); err != nil || ours == its {
			t.Errorf("QEMU's %s namespace is %s, ours is %s: %v", ns, its, ours, err)
		}
	}
	if err := syscall.Kill(v.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.Done():
	case <-time.After(2 * time.Second):
		t.Fatal("the VM is not done 2 s after its QEMU was killed")
	}
	if err := v.Err(); !errors.Is(err, hypervisor.ErrKilled) || !strings.Contains(err.Error(), "qemu has ended: killed by SIGKILL") {
		t.Errorf("Err: %v, want QEMU's death by SIGKILL", err)
	}
	if err := syscall.Kill(pids["virtiofsd"], 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("virtiofsd is left: %v", err)
	}
}

func TestVirtiofsdsDeathIsTheReason(t *testing.T) {
	q, cfg := realQEMU(t)
	cfg.KernelParams = "panic=0"
	var daemon int
	cfg.Started = func(p hypervisor.Process) error {
		if p.Name == "virtiofsd" {
			daemon = p.PID
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	v, err := q.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Stop(ctx) //nolint:errcheck // it ends below
	if err := syscall.Kill(daemon, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.Done():
	case <-time.After(2 * time.Second):
		t.Fatal("the VM is not done 2 s after its virtiofsd was killed")
	}
	if err := v.Err(); !errors.Is(err, hypervisor.ErrKilled) || !strings.Contains(err.Error(), "virtiofsd ended: killed by SIGKILL") {
		t.Errorf("Err: %v, want virtiofsd's death by SIGKILL", err)
	}
	if err := syscall.Kill(v.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("QEMU is left: %v", err)
	}
}

// A program that tells its arguments stands for virtiofsd.
func TestVirtiofsdIsGivenTheOptions(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a pid namespace needs root")
	}
	dir := t.TempDir()
	told, path := filepath.Join(dir, "told"), filepath.Join(dir, "virtiofsd")
	program := "#!/bin/sh\n[ \"$1\" = --version ] && echo virtiofsd 1.13.2 && exit\necho \"$*\" >" + told + "\n"
	if err := os.WriteFile(path, []byte(program), 0o755); err != nil {
		t.Fatal(err)
	}
	q := New(Options{Virtiofsd: path, VirtiofsdCache: "never", VirtiofsdThreads: 7})
	d, err := q.startVirtiofsd(t.Context(), hypervisor.Config{Dir: dir}, hypervisor.Share{Tag: "husk", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	case <-time.After(bootTimeout):
		t.Error("the program has not ended")
	}
	if err := d.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	got, err := os.ReadFile(told)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"--shared-dir=" + dir, "--cache=never", "--thread-pool-size=7"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("virtiofsd was given %q, want %s in it", got, want)
		}
	}
}

func TestStopIsIdempotentAndLeavesNoReason(t *testing.T) {
	q, cfg := realQEMU(t)
	cfg.KernelParams = "panic=0"
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	v, err := q.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := v.Stop(ctx); err != nil {
			t.Error(err)
		}
	}
	if err := v.Err(); err != nil {
		t.Errorf("Err after Stop: %v", err)
	}
	if _, err := v.Dial(ctx, 1025); err == nil {
		t.Error("Dial succeeded after Stop")
	}
}

func TestStartSaysWhatIsMissing(t *testing.T) {
	q, cfg := realQEMU(t)
	image, err := os.ReadFile(cfg.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(secret, image, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*QEMU, *hypervisor.Config){
		"/nonexistent/qemu":    func(q *QEMU, _ *hypervisor.Config) { q.Path = "/nonexistent/qemu" },
		"/nonexistent/kernel":  func(_ *QEMU, c *hypervisor.Config) { c.Kernel = "/nonexistent/kernel" },
		"/nonexistent/initrd":  func(_ *QEMU, c *hypervisor.Config) { c.Initrd = "/nonexistent/initrd" },
		"cannot read it":       func(_ *QEMU, c *hypervisor.Config) { c.Initrd = secret },
		"no way to the guest":  func(q *QEMU, _ *hypervisor.Config) { q.Channels = nil },
		"/nonexistent/virtiof": func(q *QEMU, _ *hypervisor.Config) { q.Virtiofsd = "/nonexistent/virtiofsd" },
		"nosuchuser":           func(q *QEMU, _ *hypervisor.Config) { q.User = "nosuchuser" },
		"unable to find CPU":   func(q *QEMU, _ *hypervisor.Config) { q.CPUModel = "nosuchcpu" },
	} {
		t.Run(want, func(t *testing.T) {
			q, cfg := New(q.Options), cfg
			change(q, &cfg)
			_, err := q.Start(context.Background(), cfg)
			if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Start: %v, want one line with %q", err, want)
			}
		})
	}
}
