package node

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"
)

// Header begins a table that has a column for each handler.
func (n *Node) Header(w io.Writer) {
	fmt.Fprintf(w, "| | %s |\n|---|---|---|\n", strings.Join(n.Handlers, " | "))
}

// Row prints a cell for each handler.
func (n *Node) Row(w io.Writer, name string, cell func(handler string) string) {
	fmt.Fprintf(w, "| %s |", name)
	for _, handler := range n.Handlers {
		fmt.Fprintf(w, " %s |", cell(handler))
	}
	fmt.Fprintln(w)
}

// InTurn calls f for each handler, and that so often, so that what else the
// machine does meets both. It ends when ctx does.
func (n *Node) InTurn(ctx context.Context, times int, f func(handler string) error) error {
	for range times {
		for _, handler := range n.Handlers {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(handler); err != nil {
				return fmt.Errorf("handler %s: %w", handler, err)
			}
		}
	}
	return nil
}

// Wait is for what has to take time.
func Wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
