// Package files is the handshake with which one connection to the guest becomes
// one operation on files there, and the body that follows it.
//
// The host opens a connection to Port for every operation and says which. Trees
// cross as tar archives, in frames.
//
//	host                                                                guest
//	 | "HSKC" op[1] idLen[1] id[idLen] pathLen[2] path[pathLen] max[4]    |
//	 |------------------------------------------------------------------->|
//	 | body: Sync, Put                                                    |
//	 |===================================================================>|
//	 |                                                   body: Read, Get  |
//	 |<===================================================================|
//	 |                                     class[1] textLen[2] text       |
//	 |<-------------------------------------------------------------------| 0: done
//	 | close                                                              |
//	 |------------------------------------------------------------------->| close
//
//	body: (length[2] bytes[length])* 0[2]
//
// Numbers are big-endian. A body ends with an empty frame and not with a
// half-close, which a multiplexed connection does not tell from the close of a
// peer that has given up: what ends otherwise was broken off, and a Sync broken off
// changes nothing. The guest may answer before the body of the host has ended, with
// an error only; it then reads on until the host closes, so that the answer is not
// lost.
package files

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Port is the guest port that the connections of operations are made to.
const Port uint32 = 1027

const (
	// MaxRead is the most that Read returns, in bytes.
	MaxRead = 1 << 20
	// MaxPath is the length of the longest path, in bytes.
	MaxPath = 4096

	// handshakeTimeout bounds ReadRequest, and the wait for a host that has been
	// answered to close the connection.
	handshakeTimeout = 30 * time.Second

	magic  = "HSKC"
	prefix = len(magic) + 2 // up to and with idLen
	maxID  = 128
)

// ErrHandshake is returned where the peer does not speak this protocol.
var ErrHandshake = errors.New("not a husk files handshake")

// An Op is what is to be done.
type Op byte

// The operations. Targets of the first three are copies that the guest keeps; the
// paths of the others are as a container's processes see them.
const (
	OpSync Op = 1 // make the copy at a target what a tar archive says
	OpRead Op = 2 // the end of a copied file
	OpDrop Op = 3 // remove the copy
	OpPut  Op = 4 // extract a tar archive into a directory of a container
	OpGet  Op = 5 // a tar archive of what is there in a container
)

// String returns the operation's name.
func (o Op) String() string {
	switch o {
	case OpSync:
		return "sync"
	case OpRead:
		return "read"
	case OpDrop:
		return "drop"
	case OpPut:
		return "put"
	case OpGet:
		return "get"
	}
	return fmt.Sprintf("operation %d", byte(o))
}

// A Request is one operation.
type Request struct {
	Op Op
	// Container is the id, of Put and Get.
	Container string
	// Path is absolute. That of a copy is clean and not the root.
	Path string
	// Max is how many bytes are asked for, of Read.
	Max int
}

// String says what is asked for, for errors.
func (r Request) String() string {
	if r.Container != "" {
		return fmt.Sprintf("%s %q in container %q", r.Op, r.Path, r.Container)
	}
	return fmt.Sprintf("%s %q", r.Op, r.Path)
}

// id is the form of the ids of containers.
var id = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

// Validate reports what no guest does. The error is InvalidArgument.
func (r Request) Validate() error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("%s: %s: %w", r, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if len(r.Path) > MaxPath || !strings.HasPrefix(r.Path, "/") || strings.ContainsRune(r.Path, 0) {
		return fmt.Errorf("%s: the path is not absolute, or above %d bytes: %w", r.Op, MaxPath, errdefs.ErrInvalidArgument)
	}
	switch r.Op {
	case OpSync, OpRead, OpDrop:
		if r.Path == "/" || path.Clean(r.Path) != r.Path {
			return invalid("the path is not a clean one")
		}
		if r.Container != "" {
			return invalid("a copy is of no container")
		}
	case OpPut, OpGet:
		if len(r.Container) > maxID || r.Container == "." || r.Container == ".." || !id.MatchString(r.Container) {
			return invalid("the container's id is not one")
		}
	default:
		return invalid("unknown operation")
	}
	if r.Op == OpRead && r.Max < 1 || r.Op != OpRead && r.Max != 0 || r.Max > MaxRead {
		return invalid("%d bytes, at most %d, and for read alone", r.Max, MaxRead)
	}
	return nil
}

func appendRequest(b []byte, r Request) []byte {
	b = append(b, magic...)
	b = append(b, byte(r.Op), byte(len(r.Container)))
	b = append(b, r.Container...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.Path)))
	b = append(b, r.Path...)
	return binary.BigEndian.AppendUint32(b, uint32(r.Max))
}

// ReadRequest is the first part of the guest's end: it reads a valid request from
// a fresh connection, and nothing of what follows. The caller reads the body of
// Sync and Put by NewBodyReader, and calls Answer, or for Read and Get AnswerBody.
func ReadRequest(conn net.Conn) (Request, error) {
	conn.SetReadDeadline(time.Now().Add(handshakeTimeout)) //nolint:errcheck // a closed conn fails in the read
	defer conn.SetReadDeadline(time.Time{})                //nolint:errcheck // likewise
	r, err := readRequest(conn)
	if err != nil {
		return Request{}, fmt.Errorf("read files handshake: %w", err)
	}
	return r, nil
}

func readRequest(rd io.Reader) (Request, error) {
	var b [prefix + 255 + 2]byte
	if _, err := io.ReadFull(rd, b[:prefix]); err != nil {
		return Request{}, err
	}
	size := int(b[prefix-1])
	if string(b[:len(magic)]) != magic || size > maxID {
		return Request{}, ErrHandshake
	}
	r := Request{Op: Op(b[len(magic)])}
	if err := readFull(rd, b[prefix:prefix+size+2]); err != nil {
		return Request{}, err
	}
	r.Container = string(b[prefix : prefix+size])
	length := int(binary.BigEndian.Uint16(b[prefix+size:]))
	if length > MaxPath {
		return Request{}, ErrHandshake
	}
	rest := make([]byte, length+4)
	if err := readFull(rd, rest); err != nil {
		return Request{}, err
	}
	r.Path = string(rest[:length])
	most := binary.BigEndian.Uint32(rest[length:])
	if most > MaxRead {
		return Request{}, ErrHandshake
	}
	r.Max = int(most)
	if err := r.Validate(); err != nil {
		return Request{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	return r, nil
}

// readFull fills b. The end of what is read is unexpected, always.
func readFull(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
