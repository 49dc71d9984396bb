package undo

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

func TestRunTakesBackInReverseAndJoinsErrors(t *testing.T) {
	var s Stack
	var order []string
	errB := errors.New("b broke")
	for _, n := range []string{"a", "b", "c"} {
		s.Push(n, time.Minute, func(context.Context) error {
			order = append(order, n)
			if n == "b" {
				return errB
			}
			return nil
		})
	}
	err := s.Run(context.Background())
	if !errors.Is(err, errB) {
		t.Errorf("Run: %v, want %v", err, errB)
	}
	if want := []string{"c", "b", "a"}; !slices.Equal(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	if err := s.Run(context.Background()); err != nil || len(order) != 3 {
		t.Errorf("a second Run did something: %v, %v", err, order)
	}
}

func TestRunOutlivesItsContextButBoundsEachStep(t *testing.T) {
	var s Stack
	s.Push("slow", time.Millisecond, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run: %v, want the step's own deadline", err)
	}
}
