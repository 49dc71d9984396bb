// Command peer is both ends of the network's benchmark, in the pods' image:
//
//	peer serve                  answer for ever
//	peer stream ADDRESS TIME    send for so long, print a Stream
//	peer echo ADDRESS COUNT     one byte there and back so often, print an Echo
//
// What it prints is JSON.
package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

// The ports that serve listens on, those that such services always had.
const (
	echoPort    = "7"
	discardPort = "9"
)

const (
	// patience is for a server that does not listen yet.
	patience = time.Minute
	retry    = 20 * time.Millisecond
	// chunk is the size of one write of a stream, in bytes.
	chunk = 128 << 10
)

// A Stream is what was sent until the server had it all.
type Stream struct {
	Bytes uint64
	Took  time.Duration
}

// An Echo is the times of round trips.
type Echo struct{ Times []time.Duration }

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "peer: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string, w io.Writer) error {
	var result any
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve()
	case len(args) == 3 && args[0] == "stream":
		length, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		conn, err := dial(net.JoinHostPort(args[1], discardPort))
		if err != nil {
			return err
		}
		defer conn.Close()
		if result, err = stream(conn, length); err != nil {
			return fmt.Errorf("stream: %w", err)
		}
	case len(args) == 3 && args[0] == "echo":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		conn, err := dial(net.JoinHostPort(args[1], echoPort))
		if err != nil {
			return err
		}
		defer conn.Close()
		if result, err = echo(conn, n); err != nil {
			return fmt.Errorf("echo: %w", err)
		}
	default:
		return errors.New("usage: peer serve | stream ADDRESS TIME | echo ADDRESS COUNT")
	}
	return json.NewEncoder(w).Encode(result)
}

// dial waits for a server that was only just started: of that nobody tells.
func dial(address string) (*net.TCPConn, error) {
	for end := time.Now().Add(patience); ; time.Sleep(retry) {
		conn, err := net.DialTimeout("tcp", address, patience)
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(end) {
			return nil, err
		}
	}
}

// serve returns only with an error.
func serve() error {
	failed := make(chan error)
	for port, answer := range map[string]func(net.Conn) error{echoPort: echoBack, discardPort: discard} {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, answer) }() // ends with the process
	}
	return <-failed
}

func accept(l net.Listener, answer func(net.Conn) error) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { // ends with the client
			defer conn.Close()
			if err := answer(conn); err != nil {
				fmt.Fprintf(os.Stderr, "peer: serve %v: %v\n", conn.RemoteAddr(), err)
			}
		}()
	}
}

// discard reads to the end and says how many bytes there were.
func discard(conn net.Conn) error {
	var total uint64
	for buf := make([]byte, chunk); ; {
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

func stream(conn *net.TCPConn, length time.Duration) (Stream, error) {
	var s Stream
	buf := make([]byte, chunk)
	began := time.Now()
	for time.Since(began) < length {
		n, err := conn.Write(buf)
		s.Bytes += uint64(n)
		if err != nil {
			return s, err
		}
	}
	if err := conn.CloseWrite(); err != nil {
		return s, err
	}
	var received uint64
	err := binary.Read(conn, binary.BigEndian, &received)
	s.Took = time.Since(began)
	if err == nil && received != s.Bytes {
		err = fmt.Errorf("the server had %d of %d bytes", received, s.Bytes)
	}
	return s, err
}

func echoBack(conn net.Conn) error {
	for b := make([]byte, 1); ; {
		if _, err := conn.Read(b); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if _, err := conn.Write(b); err != nil {
			return err
		}
	}
}

func echo(conn net.Conn, n int) (Echo, error) {
	var e Echo
	b := make([]byte, 1)
	for range n {
		began := time.Now()
		if _, err := conn.Write(b); err != nil {
			return e, err
		}
		if _, err := conn.Read(b); err != nil {
			return e, err
		}
		e.Times = append(e.Times, time.Since(began))
	}
	return e, nil
}
