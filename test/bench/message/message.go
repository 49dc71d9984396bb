// Package message measures a stream connection by messages of one size, and is
// both of its ends.
//
// A connection serves one measurement. The client begins it with a header:
//
//	0        1              5
//	+--------+--------------+
//	| kind   | size         |   kind 'e' or 's'; size of a message, big-endian
//	+--------+--------------+
//
// Of an echo ('e') each message comes back when it is complete. A stream ('s') is
// read to its end, and answered by the number of its bytes, 8 of them, big-endian.
package message

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	kindEcho   = 'e'
	kindStream = 's'

	headerSize = 5
	// maxSize bounds what a header can have the server allocate.
	maxSize = 64 << 20
	// readSize is how much of a stream the server reads at once.
	readSize = 128 << 10
)

// A Conn is a stream connection that can be closed for writing alone.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// A Stream is what was sent until the server had it all.
type Stream struct {
	Bytes uint64
	Took  time.Duration
}

// Serve answers the connections of l until l is closed, and returns when the last
// has ended.
func Serve(l net.Listener) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		serving.Go(func() { // ends with the client
			defer conn.Close()
			_ = serve(conn) // the client sees its connection end
		})
	}
}

func serve(conn net.Conn) error {
	var header [headerSize]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(header[1:])
	if size == 0 || size > maxSize {
		return fmt.Errorf("messages of %d bytes", size)
	}
	switch header[0] {
	case kindEcho:
		return answer(conn, make([]byte, size))
	case kindStream:
		return count(conn)
	}
	return fmt.Errorf("unknown kind %q", header[0])
}

// answer sends back each message that fills buf.
func answer(conn net.Conn, buf []byte) error {
	for {
		if _, err := io.ReadFull(conn, buf); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if _, err := conn.Write(buf); err != nil {
			return err
		}
	}
}

func count(conn net.Conn) error {
	var total uint64
	for buf := make([]byte, readSize); ; {
		n, err := conn.Read(buf)
		total += uint64(n)
		if errors.Is(err, io.EOF) {
			return binary.Write(conn, binary.BigEndian, total)
		}
		if err != nil {
			return err
		}
	}
}

// begin sends the header.
func begin(conn net.Conn, kind byte, size int) error {
	if size < 1 || size > maxSize {
		return fmt.Errorf("messages of %d bytes: want 1 to %d", size, maxSize)
	}
	_, err := conn.Write(binary.BigEndian.AppendUint32([]byte{kind}, uint32(size)))
	return err
}

// Echo times n messages there and back, one after the other.
func Echo(conn Conn, size, n int) ([]time.Duration, error) {
	if err := begin(conn, kindEcho, size); err != nil {
		return nil, err
	}
	sent, got := make([]byte, size), make([]byte, size)
	var times []time.Duration
	for i := range n {
		sent[0], sent[size-1] = byte(i), byte(i)
		began := time.Now()
		if _, err := conn.Write(sent); err != nil {
			return nil, fmt.Errorf("send message %d: %w", i, err)
		}
		if _, err := io.ReadFull(conn, got); err != nil {
			return nil, fmt.Errorf("receive message %d: %w", i, err)
		}
		times = append(times, time.Since(began))
		if got[0] != byte(i) || got[size-1] != byte(i) {
			return nil, fmt.Errorf("message %d came back as another", i)
		}
	}
	return times, conn.CloseWrite()
}

// Send streams messages for so long, each by one write.
func Send(conn Conn, size int, length time.Duration) (Stream, error) {
	if err := begin(conn, kindStream, size); err != nil {
		return Stream{}, err
	}
	var s Stream
	buf := make([]byte, size)
	began := time.Now()
	for time.Since(began) < length {
		n, err := conn.Write(buf)
		s.Bytes += uint64(n)
		if err != nil {
			return s, fmt.Errorf("send: %w", err)
		}
	}
	if err := conn.CloseWrite(); err != nil {
		return s, fmt.Errorf("end the stream: %w", err)
	}
	var received uint64
	if err := binary.Read(conn, binary.BigEndian, &received); err != nil {
		return s, fmt.Errorf("wait for the server's count: %w", err)
	}
	s.Took = time.Since(began)
	if received != s.Bytes {
		return s, fmt.Errorf("the server had %d of %d bytes", received, s.Bytes)
	}
	return s, nil
}
