// Package files is the guest's end of operations on files: the copies of what the
// host has, and what is copied in and out of containers.
package files

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/husk-containers/husk/protocols/files"
)

// maxOperations bounds the operations at one time, each of which has a few buffers
// and files; further ones wait.
const maxOperations = 64

// Containers are what Put and Get have to know.
type Containers interface {
	// InitPID is the first process of a running container. NotFound where there is
	// no such container, FailedPrecondition where it does not run.
	InitPID(id string) (int, error)
}

// Serve serves the operations that come from ln until ctx ends or the listener
// fails. It closes the listener and breaks the operations off then, and returns
// when they have ended; nil if ctx was the reason. Targets of copies are below dir,
// which is made with the first: agentv1.CopiesDir.
func Serve(ctx context.Context, ln net.Listener, dir string, containers Containers) error {
	return newServer(dir, containers, maxOperations).serve(ctx, ln)
}

// A server serves operations.
type server struct {
	copies     *copies
	containers Containers
	slots      chan struct{}
}

func newServer(dir string, containers Containers, limit int) *server {
	return &server{copies: newCopies(dir), containers: containers, slots: make(chan struct{}, limit)}
}

func (s *server) serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var operations sync.WaitGroup
	defer operations.Wait()
	serving, cancel := context.WithCancel(ctx)
	defer cancel() // the operations, before they are waited for
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept files connection: %w", err)
		}
		operations.Go(func() {
			defer func() { <-s.slots }()
			s.operate(serving, conn)
		})
	}
}

// operate serves one connection, and closes it.
func (s *server) operate(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r, err := files.ReadRequest(conn)
	if err != nil {
		if ctx.Err() == nil {
			slog.Warn("files connection refused", "err", err)
		}
		return
	}
	switch r.Op {
	case files.OpRead, files.OpGet:
		err = files.AnswerBody(conn, func(w io.Writer) error { return s.do(ctx, r, nil, w) })
	default:
		err = files.Answer(conn, s.do(ctx, r, files.NewBodyReader(conn), nil))
	}
	if err != nil && ctx.Err() == nil {
		slog.Debug("files", "request", r, "err", err)
	}
}

// do carries out r, with the body that it comes with or the one that it asks for.
// What it returns has an errdefs class where it is known.
func (s *server) do(ctx context.Context, r files.Request, body io.Reader, w io.Writer) error {
	var err error
	switch r.Op {
	case files.OpSync:
		err = s.copies.sync(ctx, r.Path, body)
	case files.OpDrop:
		err = s.copies.drop(ctx, r.Path)
	case files.OpRead:
		err = s.copies.read(r.Path, r.Max, w)
	case files.OpPut:
		err = s.put(r, body)
	case files.OpGet:
		err = s.get(r, w)
	default:
		err = errdefs.ErrNotImplemented
	}
	if err != nil {
		return fmt.Errorf("%s: %w", r, err)
	}
	return nil
}
