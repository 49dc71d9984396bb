package task

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Pause has the task's processes stand still, and tells of it.
func (t *Task) Pause(ctx context.Context, _ *api.PauseRequest) (*emptypb.Empty, error) {
	if err := t.container.Pause(ctx); err != nil {
		return nil, err
	}
	t.shim.Publish(&events.TaskPaused{ContainerID: t.id})
	return &emptypb.Empty{}, nil
}

// Resume has them go on, and tells of it.
func (t *Task) Resume(ctx context.Context, _ *api.ResumeRequest) (*emptypb.Empty, error) {
	if err := t.container.Resume(ctx); err != nil {
		return nil, err
	}
	t.shim.Publish(&events.TaskResumed{ContainerID: t.id})
	return &emptypb.Empty{}, nil
}

// Update changes what the task may use.
func (t *Task) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &resources); err != nil {
		return nil, fmt.Errorf("update task %q: decode the resources: %w: %w", t.id, err, errdefs.ErrInvalidArgument)
	}
	return &emptypb.Empty{}, t.container.Update(ctx, &resources)
}

// Stats tells what the task uses, as a cgroup of version 2 does.
func (t *Task) Stats(ctx context.Context, _ *api.StatsRequest) (*api.StatsResponse, error) {
	m, err := t.container.Stats(ctx)
	if err != nil {
		return nil, err
	}
	data, err := Metrics(m)
	if err != nil {
		return nil, fmt.Errorf("statistics of task %q: %w", t.id, err)
	}
	return &api.StatsResponse{Stats: data}, nil
}

// Metrics is a message of statistics as containerd takes it: the name of its type
// stands alone.
func Metrics(m proto.Message) (*anypb.Any, error) {
	raw, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: raw}, nil
}
