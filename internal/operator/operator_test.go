package operator

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/internal/statedir"
	operatorv1 "github.com/husk-containers/husk/shim/operator/v1"
)

// fake answers as it is made.
type fake struct{ status *operatorv1.StatusResponse }

func (f fake) Status(context.Context, *operatorv1.StatusRequest) (*operatorv1.StatusResponse, error) {
	return f.status, nil
}

func (fake) Reclaim(context.Context, *operatorv1.ReclaimRequest) (*operatorv1.ReclaimResponse, error) {
	return &operatorv1.ReclaimResponse{BeforeMib: 3, AfterMib: 2}, nil
}

func (fake) Pause(context.Context, *operatorv1.PauseRequest) (*operatorv1.PauseResponse, error) {
	return &operatorv1.PauseResponse{}, nil
}

func (fake) Resume(context.Context, *operatorv1.ResumeRequest) (*operatorv1.ResumeResponse, error) {
	return &operatorv1.ResumeResponse{}, nil
}

func listen(t *testing.T) (net.Listener, statedir.Shim) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() }) //nolint:errcheck // a server may have closed it
	return l, statedir.Shim{Address: path}
}

// serve serves f, or no operator at all where there is none.
func serve(t *testing.T, f operatorv1.OperatorService) statedir.Shim {
	t.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	if f != nil {
		operatorv1.RegisterOperatorService(server, f)
	}
	l, shim := listen(t)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(t.Context()), l) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Close()); err != nil {
			t.Error(err)
		}
		<-served
	})
	return shim
}

func TestCalls(t *testing.T) {
	ctx := t.Context()
	shim := serve(t, fake{&operatorv1.StatusResponse{State: operatorv1.StatusResponse_STATE_RUNNING}})
	if got, err := Status(ctx, shim); err != nil || got.GetState() != operatorv1.StatusResponse_STATE_RUNNING {
		t.Errorf("status: %v, %v", got, err)
	}
	if before, after, err := Reclaim(ctx, shim); err != nil || before != 3 || after != 2 {
		t.Errorf("reclaim: %d, %d, %v", before, after, err)
	}
	if err := errors.Join(Pause(ctx, shim), Resume(ctx, shim)); err != nil {
		t.Error(err)
	}
}

func TestErrorsSayWhy(t *testing.T) {
	silent, stopped := listen(t)
	mute, hungUp := listen(t)
	go func() { // ends with its listener
		for {
			conn, err := mute.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	defer silent.Close()
	gone := filepath.Join(t.TempDir(), "gone")
	for _, tt := range []struct {
		name, want string
		class      func(error) bool
		shim       statedir.Shim
	}{
		{"no address", "begins or ends just now", errdefs.IsUnavailable, statedir.Shim{}},
		{"no socket", "nothing listens at the shim's socket", errdefs.IsUnavailable, statedir.Shim{Address: gone}},
		{"no answer", "the shim does not answer within 100ms: it is stopped or hangs", errdefs.IsUnavailable, stopped},
		{"hung up", "has closed the connection without an answer", errdefs.IsUnavailable, hungUp},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := call(t.Context(), tt.shim, 100*time.Millisecond, func(ctx context.Context, c operatorv1.OperatorService) (*operatorv1.PauseResponse, error) {
				return c.Pause(ctx, &operatorv1.PauseRequest{})
			})
			if !tt.class(err) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if err := Pause(t.Context(), serve(t, nil)); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "does not serve the operator: it is one of an older build") {
		t.Errorf("pause by a shim without the service: %v", err)
	}
	if _, err := Status(t.Context(), serve(t, fake{&operatorv1.StatusResponse{}})); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "the shim's answer: state") {
		t.Errorf("a status without a state: %v", err)
	}
}

func TestAnOperatorWhoGivesUp(t *testing.T) {
	_, stopped := listen(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("interrupted")
	cancel(why)
	if err := Pause(ctx, stopped); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

// stopping answers no status, as a shim that is stopped.
type stopping struct {
	fake
	paused chan struct{}
}

func (stopping) Status(ctx context.Context, _ *operatorv1.StatusRequest) (*operatorv1.StatusResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s stopping) Pause(context.Context, *operatorv1.PauseRequest) (*operatorv1.PauseResponse, error) {
	close(s.paused)
	return &operatorv1.PauseResponse{}, nil
}

func TestAShimThatDoesNotAnswerIsSentNothingToDo(t *testing.T) {
	paused := make(chan struct{})
	if err := Pause(t.Context(), serve(t, stopping{paused: paused})); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
	select {
	case <-paused:
		t.Error("it was paused")
	default:
	}
}
