package files

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
)

// bodyBuffer is what a writer gathers into a frame, in bytes; a reader takes
// frames of any length that two bytes can tell.
const bodyBuffer = 32 << 10

var errBodyEnded = errors.New("write after the end of the body")

// A BodyReader reads a body.
type BodyReader struct {
	r     *bufio.Reader
	left  int // of a frame
	ended bool
}

// NewBodyReader returns a reader of the body that comes next on r. It may read
// more of r than the body.
func NewBodyReader(r io.Reader) *BodyReader { return newBodyReader(bufio.NewReader(r)) }

func newBodyReader(r *bufio.Reader) *BodyReader { return &BodyReader{r: r} }

// Read implements io.Reader. io.EOF is the end that the peer has declared; the end
// of the connection before that is io.ErrUnexpectedEOF.
func (b *BodyReader) Read(p []byte) (int, error) {
	if b.left == 0 && !b.ended {
		var size [2]byte
		if err := readFull(b.r, size[:]); err != nil {
			return 0, err
		}
		b.left = int(binary.BigEndian.Uint16(size[:]))
		b.ended = b.left == 0
	}
	if b.ended {
		return 0, io.EOF
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// A BodyWriter writes a body. Its Close ends the body, and is what makes it whole.
type BodyWriter struct {
	w     io.Writer
	frame []byte // its length is still to be filled in
	err   error  // of w
}

// NewBodyWriter returns a writer of a body.
func NewBodyWriter(w io.Writer) *BodyWriter {
	return &BodyWriter{w: w, frame: make([]byte, 2, 2+bodyBuffer)}
}

// Write implements io.Writer. Where a write has failed all later ones do.
func (b *BodyWriter) Write(p []byte) (int, error) {
	written := 0
	for b.err == nil && written < len(p) {
		n := min(len(p)-written, cap(b.frame)-len(b.frame))
		b.frame = append(b.frame, p[written:written+n]...)
		written += n
		if len(b.frame) == cap(b.frame) {
			b.flush()
		}
	}
	return written, b.err
}

// Close writes what is left and the end.
func (b *BodyWriter) Close() error {
	if b.err != nil {
		return b.err
	}
	if len(b.frame) > 2 {
		b.flush()
	}
	if b.err == nil {
		b.flush()
	}
	err := b.err
	if err == nil {
		b.err = errBodyEnded
	}
	return err
}

// flush writes the frame; an empty one is the end.
func (b *BodyWriter) flush() {
	binary.BigEndian.PutUint16(b.frame, uint16(len(b.frame)-2))
	_, b.err = b.w.Write(b.frame)
	b.frame = b.frame[:2]
}
