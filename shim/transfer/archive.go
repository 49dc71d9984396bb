package transfer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
)

// A tar is made of blocks; the last two hold zeros (POSIX.1-2017, pax, ustar interchange
// format).
const (
	block   = 512
	endMark = 2 * block
)

// whole reads a tar and fails where that ends without its end mark. A client that fails
// to read its own source can only close the stream, as it does at the end; what was cut
// between two entries would else pass for whole.
type whole struct {
	r     io.Reader
	size  int64
	zeros int // at the end of what was read
}

func (w *whole) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	zeros := 0
	for zeros < n && p[n-1-zeros] == 0 {
		zeros++
	}
	if zeros == n {
		zeros += min(w.zeros, endMark)
	}
	w.zeros = zeros
	w.size += int64(n)
	if errors.Is(err, io.EOF) && (w.zeros < endMark || w.size%block != 0) {
		err = fmt.Errorf("the tar has no end mark: it was cut short: %w", errdefs.ErrInvalidArgument)
	}
	return n, err
}

// disown writes the tar that r reads, with root as everything's owner.
func disown(r io.Reader, w io.Writer) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the tar: %w", err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader { // a comment
			continue
		}
		h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
		if err := pass(tw, h, tr); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, r) // what pads the tar, and its end
	return err
}

// pass writes an entry, with its content.
func pass(tw *tar.Writer, h *tar.Header, content io.Reader) error {
	h.Format = tar.FormatPAX // which has room for everything that another one has
	if h.Typeflag == tar.TypeGNUSparse {
		h.Typeflag = tar.TypeReg // it is read with its holes filled
	}
	if err := tw.WriteHeader(h); err != nil {
		return fmt.Errorf("entry %.200q: %w", h.Name, err)
	}
	if _, err := io.Copy(tw, content); err != nil {
		return fmt.Errorf("entry %.200q: %w", h.Name, err)
	}
	return nil
}

// sparse tells whether an entry is of few bytes, and is read as any number of zeros.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for record := range h.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// shallow makes of a CopyOut one that copies a directory without what is in it.
func shallow(copyOut func(context.Context, string, io.Writer) error) func(context.Context, string, io.Writer) error {
	return func(ctx context.Context, path string, w io.Writer) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		r, pipe := io.Pipe()
		done := make(chan error, 1)
		go func() {
			err := copyOut(ctx, path, pipe)
			pipe.CloseWithError(err)
			done <- err
		}()
		err := first(r, w)
		r.Close() //nolint:errcheck // it has none
		cancel()
		if cause := <-done; errors.Is(err, cause) {
			return cause // nothing of a tar came
		}
		return err
	}
}

// first copies the first entry of a tar, as a tar.
func first(r io.Reader, w io.Writer) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	h, err := tr.Next()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("read the container's tar: %w", err)
	}
	if sparse(h) {
		return fmt.Errorf("the container's tar: entry %.200q has holes, which an agent does not write: %w", h.Name, errdefs.ErrInvalidArgument)
	}
	if err := pass(tw, h, tr); err != nil {
		return err
	}
	return tw.Close()
}
