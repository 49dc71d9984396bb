// Package events tells containerd what happens to tasks, in order.
package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// capacity is how many events wait at most for a containerd that is away.
	capacity = 2048
	// maxAge is how long an event waits at most: containerd asks for the state
	// of tasks when it comes back, so older news is none.
	maxAge = 5 * time.Minute
	// forwardTimeout bounds one call to containerd.
	forwardTimeout = 5 * time.Second
	// minRetry and maxRetry bound the pause between two tries to reach
	// containerd, which doubles.
	minRetry = 50 * time.Millisecond
	maxRetry = 2 * time.Second
)

// An Event is one of the task events of containerd's API that topic knows.
type Event interface {
	proto.Message
	GetContainerID() string
}

// topic returns where containerd's clients look for an event, empty for one that
// is not among them.
func topic(ev Event) string {
	switch ev.(type) {
	case *events.TaskCreate:
		return "/tasks/create"
	case *events.TaskStart:
		return "/tasks/start"
	case *events.TaskExecAdded:
		return "/tasks/exec-added"
	case *events.TaskExecStarted:
		return "/tasks/exec-started"
	case *events.TaskOOM:
		return "/tasks/oom"
	case *events.TaskPaused:
		return "/tasks/paused"
	case *events.TaskResumed:
		return "/tasks/resumed"
	case *events.TaskExit:
		return "/tasks/exit"
	case *events.TaskDelete:
		return "/tasks/delete"
	}
	return ""
}

// A Publisher forwards events to containerd one by one, in the order of Publish,
// and waits for a containerd that restarts. Its methods are safe for concurrent
// use.
type Publisher struct {
	path, namespace string

	mu     sync.Mutex
	queue  []*types.Envelope // what has not been forwarded, oldest first
	wake   chan struct{}     // a token after each change of queue or closed
	closed bool

	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended
}

// NewPublisher returns a publisher for containerd's events socket at path and
// starts its goroutine, which Close ends.
func NewPublisher(path, namespace string) (*Publisher, error) {
	if path == "" {
		return nil, fmt.Errorf("publish events: containerd named no address for them in TTRPC_ADDRESS: %w", errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Publisher{path: path, namespace: namespace, wake: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	go p.run(ctx)
	return p, nil
}

// Publish queues an event and returns at once.
func (p *Publisher) Publish(ev Event) {
	env, err := p.envelope(ev)
	if err != nil {
		slog.Error("event lost", "err", err)
		return
	}
	p.mu.Lock()
	full := len(p.queue) >= capacity
	if !full && !p.closed {
		p.queue = append(p.queue, env)
	}
	p.mu.Unlock()
	if full {
		slog.Error("event lost: containerd takes none and too many wait", "topic", env.Topic, "container", ev.GetContainerID())
		return
	}
	p.signal()
}

func (p *Publisher) envelope(ev Event) (*types.Envelope, error) {
	name := ev.ProtoReflect().Descriptor().FullName()
	topic := topic(ev)
	if topic == "" {
		return nil, fmt.Errorf("publish %s: it has no topic: %w", name, errdefs.ErrInvalidArgument)
	}
	raw, err := proto.Marshal(ev)
	if err != nil {
		return nil, fmt.Errorf("publish %s: %w", name, err)
	}
	return &types.Envelope{
		Timestamp: timestamppb.Now(), Namespace: p.namespace, Topic: topic,
		// containerd registers its types by their bare names.
		Event: &anypb.Any{TypeUrl: string(name), Value: raw},
	}, nil
}

func (p *Publisher) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Close takes no more events, waits until the queued ones were forwarded or ctx
// has ended, and ends the goroutine. It is idempotent.
func (p *Publisher) Close(ctx context.Context) error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.signal()
	select {
	case <-p.done:
	case <-ctx.Done():
		p.cancel()
		<-p.done
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.queue); n > 0 {
		return fmt.Errorf("publish events: containerd did not take the last %d: %w", n, context.Cause(ctx))
	}
	return nil
}

// head returns the oldest event, nil where there is none, and whether there may
// be more later.
func (p *Publisher) head() (env *types.Envelope, more bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		return nil, !p.closed
	}
	return p.queue[0], true
}

func (p *Publisher) pop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue[0] = nil
	p.queue = p.queue[1:]
}

// run forwards until the publisher is closed and its queue empty, or ctx ends.
func (p *Publisher) run(ctx context.Context) {
	defer close(p.done)
	var link link
	defer link.close()
	retry := minRetry
	for ctx.Err() == nil {
		env, more := p.head()
		if env == nil {
			if !more {
				return
			}
			select {
			case <-p.wake:
			case <-ctx.Done():
			}
			continue
		}
		err := link.forward(ctx, p.path, env)
		switch {
		case err == nil:
			retry = minRetry
			p.pop()
			continue
		case permanent(err):
			slog.Error("event lost: containerd refuses it", "topic", env.Topic, "err", err)
			p.pop()
			continue
		case time.Since(env.Timestamp.AsTime()) > maxAge:
			slog.Error("event lost: containerd has not taken it in time", "topic", env.Topic, "err", err)
			p.pop()
			continue
		}
		link.close()
		select {
		case <-time.After(retry):
		case <-ctx.Done():
		}
		retry = min(2*retry, maxRetry)
	}
}

// permanent tells whether containerd took an event and refused it.
func permanent(err error) bool {
	st, ok := status.FromError(err)
	if !ok || errors.Is(err, ttrpc.ErrClosed) {
		return false
	}
	switch st.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return false
	}
	return true
}

// A link is a connection to containerd, or none.
type link struct{ client *ttrpc.Client }

// forward makes one call, over the connection there is or a new one.
func (l *link) forward(ctx context.Context, path string, env *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	if l.client == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return err
		}
		l.client = ttrpc.NewClient(conn)
	}
	_, err := ttrpcevents.NewTTRPCEventsClient(l.client).Forward(ctx, &ttrpcevents.ForwardRequest{Envelope: env})
	return err
}

func (l *link) close() {
	if l.client != nil {
		l.client.Close() //nolint:errcheck // it is of no more use
		l.client = nil
	}
}
