package shim

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
)

// A phase is how far containerd has come with the service's sandbox. Whether the
// VM lives is another matter: see lifecycle.
//
//	from \ to  absent  creating  created  started
//	absent                x                  x
//	creating     x                  x
//	created                                  x
//
// Creating to absent is a CreateSandbox that failed. Absent to started is a shim
// for the task API, whose sandbox is made before anybody calls.
type phase int

const (
	absent phase = iota
	creating
	created
	started
)

// A lifecycle is the service's sandbox through its life. The service's lock guards
// it; channels and sandbox are not replaced once the phase is created.
type lifecycle struct {
	phase   phase
	sandbox sandbox
	netns   string
	// made is open while the phase is creating.
	made chan struct{}
	// up is set when the guest was ready.
	up bool
	// stopping is set when somebody wants the end.
	stopping bool
	// ended is closed when the VM is gone, at exitedAt.
	ended    chan struct{}
	exitedAt time.Time
}

// makeSandbox makes the one sandbox. It is AlreadyExists where there is one.
func (s *Service) makeSandbox(ctx context.Context, cfg SandboxConfig) (err error) {
	s.mu.Lock()
	switch {
	case s.pod.phase != absent:
		err = fmt.Errorf("sandbox %q: %w", s.id, errdefs.ErrAlreadyExists)
	case s.ending:
		err = fmt.Errorf("sandbox %q: its shim is shutting down: %w", s.id, errdefs.ErrFailedPrecondition)
	default:
		s.pod.phase, s.pod.made = creating, make(chan struct{})
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	sb, err := s.startVM(context.WithoutCancel(ctx), cfg)
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(s.pod.made)
	if err != nil {
		s.pod.phase = absent
		return err
	}
	s.pod.phase, s.pod.sandbox, s.pod.netns, s.pod.ended = created, sb, cfg.NetNS, make(chan struct{})
	// stop waits for made before it lets go of the background.
	s.background.Go(func() { s.watchEnd(sb) })
	s.background.Go(func() { s.watchOOMs(sb) })
	return nil
}

// watchEnd notes when the VM is gone.
func (s *Service) watchEnd(sb sandbox) {
	select {
	case <-sb.Done():
	case <-s.done:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pod.exitedAt = time.Now()
	close(s.pod.ended)
}

// watchOOMs publishes which containers ran out of memory.
func (s *Service) watchOOMs(sb sandbox) {
	for {
		select {
		case id := <-sb.OOMs():
			// A task that is being created tells at its end.
			if t, err := s.task(id); err == nil {
				t.TellOOM()
			}
		case <-s.done:
			return
		}
	}
}

// exitStatus is that of a sandbox whose VM is gone, as of a process: 0 where it was
// stopped, otherwise that of a SIGKILL.
func exitStatus(sb sandbox) uint32 {
	if sb.Err() != nil {
		return 128 + 9
	}
	return 0
}

// current returns the sandbox and how it is, or NotFound where there is none.
func (s *Service) current() (lifecycle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod.sandbox == nil {
		return lifecycle{}, fmt.Errorf("sandbox %q was not created: %w", s.id, errdefs.ErrNotFound)
	}
	return s.pod, nil
}

// startedSandbox returns the sandbox for a container to be created in. It is
// FailedPrecondition before it was started and once it is to be stopped.
func (s *Service) startedSandbox() (sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.pod.phase != started:
		return nil, fmt.Errorf("sandbox %q was not started: %w", s.id, errdefs.ErrFailedPrecondition)
	case s.pod.stopping:
		return nil, fmt.Errorf("sandbox %q is stopped: %w", s.id, errdefs.ErrFailedPrecondition)
	}
	return s.pod.sandbox, nil
}

// beginStart claims the start of a sandbox that was created.
func (s *Service) beginStart() (sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.pod.phase == started:
		return nil, fmt.Errorf("start sandbox %q: it was started before: %w", s.id, errdefs.ErrFailedPrecondition)
	case s.pod.phase != created:
		return nil, fmt.Errorf("start sandbox %q: it was not created: %w", s.id, errdefs.ErrFailedPrecondition)
	case s.pod.stopping:
		return nil, fmt.Errorf("start sandbox %q: it is stopped: %w", s.id, errdefs.ErrFailedPrecondition)
	}
	s.pod.phase = started
	return s.pod.sandbox, nil
}

// setUp notes that the guest was ready.
func (s *Service) setUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pod.up = true
}

// alive returns why the sandbox does not serve containers; nil where it does.
func (l lifecycle) alive() error {
	if err := l.sandbox.Err(); err != nil {
		return fmt.Errorf("its VM is gone: %w: %w", err, errdefs.ErrUnavailable)
	}
	switch {
	case l.stopping || l.gone():
		return fmt.Errorf("it is stopped: %w", errdefs.ErrUnavailable)
	case !l.up:
		return fmt.Errorf("it is not started: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// gone tells whether the VM has ended.
func (l lifecycle) gone() bool { return !l.exitedAt.IsZero() }

// stopSandbox stops the sandbox where there is one, also one that is being made. It
// is idempotent.
func (s *Service) stopSandbox(ctx context.Context) error {
	s.mu.Lock()
	made := s.pod.made
	s.mu.Unlock()
	if made != nil {
		<-made // making one does not wait for anything
	}
	s.mu.Lock()
	sb := s.pod.sandbox
	s.pod.stopping = sb != nil
	s.mu.Unlock()
	if sb == nil {
		return nil
	}
	return sb.Stop(ctx)
}

// giveUp ends a shim that containerd does not want: one that died between the start
// and CreateSandbox, and was started again, does not know of it.
func (s *Service) giveUp() {
	s.mu.Lock()
	unwanted := s.pod.phase == absent && !s.ending
	s.ending = s.ending || unwanted
	s.mu.Unlock()
	if unwanted {
		slog.Warn("shim ends: containerd has not asked for a sandbox", "within", s.patience)
		s.askedOnce.Do(func() { close(s.shutdown) })
	}
}

// owns tells whether the sandbox was made for the task of that id: it is of no use
// without, and containerd does not try again. A member's failure is not the pod's.
func (s *Service) owns(id string) bool { return !s.hold && id == s.id }

// abandonSandbox stops the sandbox of a container that could not be created.
func (s *Service) abandonSandbox(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := s.stopSandbox(ctx); err != nil {
		slog.Error("stop the sandbox of a container that could not be created", "container", id, "err", err)
	}
}
