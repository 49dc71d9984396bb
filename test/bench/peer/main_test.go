package main

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// pair is a connection on loopback whose other end has one answer.
func pair(t *testing.T, answer func(net.Conn) error) *net.TCPConn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- accept(l, answer) }()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	conn, err := dial(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestStreamCountsWhatTheServerHad(t *testing.T) {
	s, err := stream(pair(t, discard), 50*time.Millisecond)
	if err != nil || s.Bytes == 0 || s.Took < 50*time.Millisecond {
		t.Errorf("stream: %+v, %v", s, err)
	}
}

func TestStreamThatLosesBytesIsAnError(t *testing.T) {
	_, err := stream(pair(t, func(conn net.Conn) error {
		io.ReadFull(conn, make([]byte, 1)) // is counted by nobody
		return discard(conn)
	}), time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "the server had") {
		t.Errorf("stream: %v, want what is missing", err)
	}
}

func TestEchoTimesEachRoundTrip(t *testing.T) {
	e, err := echo(pair(t, echoBack), 10)
	if err != nil || len(e.Times) != 10 {
		t.Fatalf("echo: %d round trips, %v", len(e.Times), err)
	}
	for _, took := range e.Times {
		if took <= 0 {
			t.Errorf("a round trip took %v", took)
		}
	}
}

func TestEchoOfAServerThatLeavesIsAnError(t *testing.T) {
	if _, err := echo(pair(t, func(net.Conn) error { return nil }), 1000); err == nil {
		t.Error("no error")
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"serve", "x"}, {"echo", "127.0.0.1"}, {"stream", "127.0.0.1", "fast"}, {"echo", "127.0.0.1", "many"}} {
		if err := run(args, io.Discard); err == nil {
			t.Errorf("peer %v: no error", args)
		}
	}
}
