package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
)

// maxText bounds what an error says, in bytes.
const maxText = 1024

// classes are the classes of errors in the order of their numbers. The first is
// also that of an error without one.
var classes = [...]error{
	1:  errdefs.ErrUnknown,
	2:  errdefs.ErrInvalidArgument,
	3:  errdefs.ErrNotFound,
	4:  errdefs.ErrAlreadyExists,
	5:  errdefs.ErrPermissionDenied,
	6:  errdefs.ErrResourceExhausted,
	7:  errdefs.ErrFailedPrecondition,
	8:  errdefs.ErrAborted,
	9:  errdefs.ErrNotImplemented,
	10: errdefs.ErrInternal,
	11: errdefs.ErrUnavailable,
}

// A guestError is what the guest says went wrong.
type guestError struct {
	text  string
	class error
}

func (e *guestError) Error() string { return e.text }
func (e *guestError) Unwrap() error { return e.class }

// Answer is the last part of the guest's end of Sync, Put and Drop: it tells the
// host what came of the operation, by the class that errdefs has err of and one line,
// and returns when the host has closed the connection, or does not. The caller closes
// it then.
func Answer(conn net.Conn, err error) error {
	if err := writeAnswer(conn, err); err != nil {
		return err
	}
	// What is on its way still is read: a close before would have the answer lost.
	if _, rerr := io.Copy(io.Discard, conn); rerr != nil {
		return fmt.Errorf("answer: wait for the host: %w", rerr)
	}
	return nil
}

// AnswerBody is the last part of the guest's end of Read and Get: it sends the body
// that write writes, and then does as Answer with what write returns. Where the host
// goes away the writes fail; it closes the connection.
func AnswerBody(conn net.Conn, write func(io.Writer) error) error {
	gone := make(chan struct{})
	go func() { // ends with the host's close, or the deadline of the answer
		defer close(gone)
		io.Copy(io.Discard, conn) //nolint:errcheck // either way the host is gone
		conn.Close()              // a multiplexed connection would take the rest of the body
	}()
	defer func() { <-gone }()
	body := NewBodyWriter(conn)
	err := write(body)
	cerr := body.Close()
	if cerr == nil {
		cerr = writeAnswer(conn, err)
	}
	if cerr != nil {
		conn.Close()
	}
	return cerr
}

func writeAnswer(conn net.Conn, err error) error {
	conn.SetDeadline(time.Now().Add(handshakeTimeout)) //nolint:errcheck // a closed conn fails in the write
	if _, err := conn.Write(appendAnswer(nil, err)); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

func appendAnswer(b []byte, err error) []byte {
	if err == nil {
		return append(b, 0, 0, 0)
	}
	class := 1
	for i, c := range classes {
		if i > 0 && errors.Is(err, c) {
			class = i
			break
		}
	}
	text := line(err.Error())
	b = binary.BigEndian.AppendUint16(append(b, byte(class)), uint16(len(text)))
	return append(b, text...)
}

// readAnswer returns what the guest says of the operation.
func readAnswer(r io.Reader) error {
	var b [3]byte
	if err := readFull(r, b[:]); err != nil {
		return fmt.Errorf("read the guest's answer: %w", err)
	}
	class, size := int(b[0]), int(binary.BigEndian.Uint16(b[1:]))
	if class >= len(classes) || size > maxText || class == 0 && size > 0 {
		return ErrHandshake
	}
	text := make([]byte, size)
	if err := readFull(r, text); err != nil {
		return fmt.Errorf("read the guest's answer: %w", err)
	}
	if class == 0 {
		return nil
	}
	said := line(string(text))
	if said == "" {
		said = classes[class].Error()
	}
	return &guestError{text: said, class: classes[class]}
}

// line makes one printable line of bounded length of a text.
func line(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar { // a rune cut off, too
			return ' '
		}
		return r
	}, text[:min(len(text), maxText)])
}
