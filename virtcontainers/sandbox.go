package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/husk-containers/husk/config"
	"github.com/husk-containers/husk/hypervisor"
	"github.com/husk-containers/husk/internal/statedir"
	"github.com/husk-containers/husk/internal/undo"
	"github.com/husk-containers/husk/virtcontainers/capacity"
	"github.com/husk-containers/husk/virtcontainers/cgroup"
	"github.com/husk-containers/husk/virtcontainers/guest"
	"github.com/husk-containers/husk/virtcontainers/placement"
	"github.com/husk-containers/husk/virtcontainers/podfiles"
	"github.com/husk-containers/husk/virtcontainers/process"
	"github.com/husk-containers/husk/virtcontainers/record"
	"github.com/husk-containers/husk/virtcontainers/resource"
	"github.com/husk-containers/husk/virtcontainers/sockets"
	"github.com/husk-containers/husk/virtcontainers/spec"
	"github.com/husk-containers/husk/virtcontainers/storage"
	"github.com/husk-containers/husk/virtcontainers/uplink"
	"github.com/husk-containers/husk/virtcontainers/volume"
)

// Options is what a sandbox is made of.
type Options struct {
	// ID and Namespace are containerd's.
	ID, Namespace string
	// Bundle is the directory of the sandbox's first container; the clean-me
	// record is written there.
	Bundle string
	// Spec of that container, as the bundle holds it; nil for a pod without a sandbox
	// container, of which then Hostname, Sysctls and Network tell.
	Spec     *specs.Spec
	Hostname string
	Sysctls  map[string]string
	Network  spec.Network
	// CgroupsPath is the host's cgroup of such a pod, as a spec's linux.cgroupsPath
	// would name it; empty: it has none. With a spec the shim is born in it; see Spawn.
	CgroupsPath string
	// Limits of a pod's containers together, as far as they are known when it is made;
	// those of a container that is in no pod are in its spec.
	Limits resource.Limits
	// ResolvConf is the content of such a pod's /etc/resolv.conf; nil: the host's.
	ResolvConf *string
	shmBytes   uint64              // of a pod's shared memory, as its first container has it
	first      placement.Container // what a container in no pod is bound to
	// Pod: containers join the sandbox, whose first one, if it has a spec, only holds
	// it.
	Pod        bool
	Config     *config.Config
	Hypervisor hypervisor.Hypervisor
	// Host is the host's file systems; nil means as the process's own mount namespace
	// has them.
	Host Host
	// Address is the path of the socket on which the sandbox's shim serves, left for the
	// operator's tool; empty: there is none.
	Address string
	// Began is when the work for this sandbox began; zero means now.
	Began time.Time
	// Log receives what an operator must know; it names the sandbox. nil means
	// slog.Default().
	Log *slog.Logger
}

// A Host is the host's file systems, from wherever the process is; hostns.Namespace
// is one.
type Host interface {
	// Clone returns a detached copy of the mount at a path, with recursive also of
	// those below it, as the host has them now.
	Clone(path string, recursive bool) (*os.File, error)
	sockets.Host
}

// A Sandbox is one VM and the containers in it; guest.State tells its life. Its
// methods are safe for concurrent use.
type Sandbox struct {
	id     string
	dir    string
	config *config.Config
	log    *slog.Logger
	host   Host
	record *record.Record
	cgroup *cgroup.Cgroup // nil: the shim is where it was started
	// oomsAtBoot are the host's OOM kills in it before there was a VM.
	oomsAtBoot uint64
	undo       undo.Stack
	created    time.Time
	pod        bool
	// hostname and sysctls of the guest as a whole, given once at boot.
	hostname string
	sysctls  map[string]string
	network  spec.Network
	shmBytes uint64          // of /dev/shm, where containers share it; 0: the agent's default
	files    *podfiles.Files // nil: the containers bring them
	uplink   *uplink.Uplink
	volumes  *volume.Table
	sockets  *sockets.Table

	processes *process.Sandbox
	boot      capacity.Boot
	capacity  *capacity.Table

	guest    *guest.Guest
	stopOnce sync.Once
	stopErr  error
	// work counts the goroutines that serve the sandbox, and the containers that
	// are being created; watchCtx ends the former.
	work     sync.WaitGroup
	watchCtx context.Context //nolint:containedctx // the lifetime of the sandbox's own goroutines
	endWatch context.CancelFunc
	ooms     chan string

	mu         sync.Mutex
	stopping   bool // nothing new is begun
	rootfs     int  // number of the last root file system that was shared
	containers map[string]*Container
}

// NewSandbox writes the clean-me record, begins to boot the VM, and returns at
// once; CreateContainer waits for the boot and returns its error.
func NewSandbox(ctx context.Context, o Options) (_ *Sandbox, err error) {
	if !validID.MatchString(o.ID) || !validID.MatchString(o.Namespace) {
		return nil, fmt.Errorf("sandbox id %q in namespace %q: not letters, digits, '_', '.', '-': %w", o.ID, o.Namespace, errdefs.ErrInvalidArgument)
	}
	if o.Began.IsZero() {
		o.Began = time.Now()
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Host == nil {
		o.Host = storage.Here{}
	}
	if err := o.readSpec(); err != nil {
		return nil, fmt.Errorf("sandbox %q: %w", o.ID, err)
	}
	boot, err := capacity.Plan(o.Config.Hypervisor, o.Limits, o.first)
	if err != nil {
		return nil, fmt.Errorf("sandbox %q: %w", o.ID, err)
	}
	dir := statedir.Sandbox(o.Config.Runtime.StateDir, o.Namespace, o.ID)
	watchCtx, endWatch := context.WithCancel(context.WithoutCancel(ctx))
	s := &Sandbox{
		id: o.ID, dir: dir, config: o.Config, log: o.Log, host: o.Host,
		pod: o.Pod, hostname: hostname(o.Hostname), sysctls: o.Sysctls, shmBytes: o.shmBytes, network: o.Network, created: time.Now(),
		boot: boot, watchCtx: watchCtx, endWatch: endWatch, ooms: make(chan string, 16), containers: map[string]*Container{},
	}
	if err := s.prepare(&o); err != nil {
		return nil, errors.Join(fmt.Errorf("sandbox %q: %w", o.ID, err), s.undo.Run(ctx))
	}
	if o.Spec == nil {
		if s.files, err = podfiles.Make(filepath.Join(dir, "etc"), s.hostname, o.ResolvConf); err != nil {
			return nil, errors.Join(fmt.Errorf("sandbox %q: %w", o.ID, err), s.undo.Run(ctx))
		}
	}
	s.guest = guest.New(ctx, guest.Options{
		Hypervisor: o.Hypervisor, Prepare: s.machine, OnEvent: s.onEvent, OnEnd: s.onEnd,
		BootTimeout: o.Config.Runtime.BootTimeout.Duration, RequestTimeout: o.Config.Runtime.RequestTimeout.Duration,
		StopTimeout: o.Config.Runtime.StopTimeout.Duration, Began: o.Began, Log: o.Log,
	})
	s.capacity = s.newCapacity(&o)
	s.processes = &process.Sandbox{
		Guest: s.guest, Spawn: s.spawn, Log: o.Log,
		StopTimeout: o.Config.Runtime.StopTimeout.Duration, DrainTimeout: o.Config.Runtime.DrainTimeout.Duration,
	}
	s.sockets = sockets.New(sockets.Options{
		Guest: s.guest, Host: s.host, Record: s.record, Allowed: o.Config.Runtime.AllowedSockets, Log: o.Log,
	})
	s.volumes = volume.New(volume.Options{
		Private: s.privateDir(), Stage: s.dir, Clone: s.host.Clone, Guest: s.guest, Sockets: s.sockets, Log: o.Log,
	})
	s.oomsAtBoot = s.oomKills()
	s.guest.Boot()
	s.undo.Push("end the guest", hostStep, s.guest.Close)
	s.spawn(s.volumes.Follow)
	return s, nil
}

// readSpec takes what concerns the guest as a whole from the spec, and refuses one
// that the guest cannot honour before anything is booted.
func (o *Options) readSpec() error {
	switch {
	case o.Spec == nil:
		return nil
	case o.Pod:
		plan, err := spec.Pod(o.Spec)
		if err != nil {
			return err
		}
		o.Network, o.Sysctls = plan.Network, plan.Sysctls
		if plan.Shm != nil {
			size, tmpfs, err := volume.Tmpfs(plan.Shm, o.Bundle, o.Host.Clone)
			if err != nil {
				return err
			}
			if tmpfs {
				o.shmBytes = size
			}
		}
	default:
		plan, err := spec.Transform(o.Spec, o.ID, false)
		if err != nil {
			return err
		}
		o.Network, o.Sysctls = plan.Network, plan.Sysctls
		if o.Limits, err = resource.OfSpec(plan.Spec.Linux.Resources); err != nil {
			return err
		}
		o.first = placement.Container{ID: o.ID, CPUs: plan.CPUs, Mems: plan.Mems, NanoCPUs: o.Limits.NanoCPUs}
	}
	o.Hostname = o.Spec.Hostname
	return nil
}

// prepare writes the record, which comes before any resource, and makes the
// sandbox's directory.
func (s *Sandbox) prepare(o *Options) (err error) {
	if s.record, err = record.Open(o.Bundle, s.dir); err != nil {
		return err
	}
	if err := s.record.Add("shim", os.Getpid()); err != nil {
		return err
	}
	s.undo.Push("remove the record", hostStep, func(context.Context) error { return s.record.Remove() })
	if err := s.enter(o.CgroupsPath); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(s.dir, 0o711); err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("%s is there already: %w", s.dir, errdefs.ErrAlreadyExists)
		}
		return err
	}
	s.undo.Push("remove the directory", hostStep, func(context.Context) error { return storage.RemoveTree(s.dir) })
	if o.Address != "" {
		if err := statedir.SetAddress(s.dir, o.Address); err != nil {
			return err
		}
	}
	if err := storage.Expose(s.privateDir(), s.shareDir()); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(s.privateDir(), volume.Dir), 0o755); err != nil {
		return err
	}
	s.undo.Push("take back the containers", hostStep, s.dropContainers)
	return nil
}

// privateDir holds the containers' directories; shareDir shows it to the guest.
func (s *Sandbox) privateDir() string { return filepath.Join(s.dir, "private") }
func (s *Sandbox) shareDir() string   { return filepath.Join(s.dir, "share") }

// PID is the VM monitor's process id on the host, 0 before the boot.
func (s *Sandbox) PID() int { return s.guest.PID() }

// Created is when the sandbox was.
func (s *Sandbox) Created() time.Time { return s.created }

// Start waits until the guest is ready, and returns why it is not.
func (s *Sandbox) Start(ctx context.Context) error { return s.guest.Await(ctx) }

// Leave has the sandbox outlive the bundle of its first container, which is about to
// be deleted.
func (s *Sandbox) Leave() error { return s.record.Leave() }

// Done is closed when the VM is gone, of itself or by Stop.
func (s *Sandbox) Done() <-chan struct{} { return s.guest.Dead() }

// Err says why the sandbox failed; nil while it runs and after a mere Stop.
func (s *Sandbox) Err() error { return s.guest.Err() }

// OOMs yields the ids of containers whose TakeOOM has something to tell. It is never
// closed.
func (s *Sandbox) OOMs() <-chan string { return s.ooms }

// Containers returns those that have not been deleted, in order of their ids.
func (s *Sandbox) Containers() []*Container {
	s.mu.Lock()
	defer s.mu.Unlock()
	cs := slices.Collect(maps.Values(s.containers))
	slices.SortFunc(cs, func(a, b *Container) int { return strings.Compare(a.id, b.id) })
	return cs
}

// Container returns the container of that id, or NotFound.
func (s *Sandbox) Container(id string) (*Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

// ownPIDs lists the containers that live in PID namespaces of their own, in order of
// their ids.
func (s *Sandbox) ownPIDs() []string {
	var ids []string
	for _, c := range s.Containers() {
		c.mu.Lock()
		own := c.ownPID
		c.mu.Unlock()
		if state := c.init.State(); own && state != Stopped && state != Deleted {
			ids = append(ids, c.id)
		}
	}
	return ids
}

// reserve takes the id of a container that is being created; Stop waits for the
// s.work.Done that follows.
func (s *Sandbox) reserve(c *Container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return fmt.Errorf("sandbox %q is stopped: %w", s.id, errdefs.ErrFailedPrecondition)
	}
	if s.containers[c.id] != nil {
		return errdefs.ErrAlreadyExists
	}
	s.containers[c.id] = c
	s.work.Add(1)
	return nil
}

func (s *Sandbox) release(c *Container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, c.id)
}

// checkSysctls refuses a container that wants the guest's network tuned otherwise
// than it was at boot: containers of a sandbox share it.
func (s *Sandbox) checkSysctls(want map[string]string) error {
	for k, v := range want {
		if s.sysctls[k] != v {
			return fmt.Errorf("linux.sysctl %s=%s: the network is the sandbox's, whose first container did not ask for it: %w",
				k, v, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// spawn runs f among the goroutines that Stop waits for, unless Stop has come
// first. Its context is watchCtx.
func (s *Sandbox) spawn(f func(ctx context.Context)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.work.Go(func() { f(s.watchCtx) })
	return true
}

// Stop ends the sandbox: asks the guest to power off, and takes everything back
// whatever the guest does. The guest has until ctx ends, at most stop_timeout. It
// is idempotent.
func (s *Sandbox) Stop(ctx context.Context) error {
	s.stopOnce.Do(func() { s.stopErr = s.stop(ctx) })
	return s.stopErr
}

func (s *Sandbox) stop(ctx context.Context) error {
	began := time.Now()
	s.guest.Stop(ctx)
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	err := s.undo.Run(ctx)
	s.log.Info("sandbox stopped", "took", ms(time.Since(began)))
	return err
}

// dropContainers takes back what the containers hold on the host once the VM is
// gone, their processes have exited, and none is being created.
func (s *Sandbox) dropContainers(ctx context.Context) error {
	s.endWatch()
	idle := make(chan struct{})
	go func() { // ends with the work
		defer close(idle)
		s.work.Wait()
	}()
	var errs []error
	select {
	case <-idle:
	case <-ctx.Done():
		errs = append(errs, errors.New("something still works for the sandbox: a mount that hangs?"))
	}
	for _, c := range s.Containers() {
		errs = append(errs, c.undo.Run(ctx))
	}
	return errors.Join(append(errs, s.volumes.Close())...)
}
