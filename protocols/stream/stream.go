// Package stream is the handshake with which one connection to the guest is
// bound to one standard stream of one process.
//
// The host opens a connection to Port for every stream and presents a one-time
// token; the guest keeps the connection until a CreateContainer or ExecProcess
// call names that token, and then the bytes of the stream follow, unframed.
// EOF is a half-close, in band.
//
//	host                                   guest
//	 | "HSK1" token[16]                      |
//	 |-------------------------------------->| keep under token
//	 |                                    ok |
//	 |<--------------------------------------| one byte: 0
//	 | CreateContainer{streams: token}       | (control connection)
//	 |-------------------------------------->| claim, once
//	 | stream bytes, either direction        |
//	 |<=====================================>|
package stream

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Port is the guest port that stream connections are made to.
const Port uint32 = 1025

// TokenLen is the length of a token in bytes.
const TokenLen = 16

// handshakeTimeout bounds ReadToken: a peer that connects says who it is at once.
const handshakeTimeout = 30 * time.Second

const (
	magic     = "HSK1"
	answerOK  = 0
	answerBad = 1
)

// ErrHandshake is returned where the peer does not speak this protocol.
var ErrHandshake = errors.New("not a husk stream handshake")

// A Token binds a connection to a stream. It is random and used once.
type Token [TokenLen]byte

// NewToken returns a fresh random token.
func NewToken() Token {
	var t Token
	rand.Read(t[:]) //nolint:errcheck // never fails since Go 1.24
	return t
}

// ParseToken returns the token held in b, which must be TokenLen bytes long.
func ParseToken(b []byte) (Token, error) {
	var t Token
	if len(b) != TokenLen {
		return t, fmt.Errorf("stream token of %d bytes, want %d", len(b), TokenLen)
	}
	copy(t[:], b)
	return t, nil
}

// String returns the first four bytes in hex: enough to tell streams apart in a
// log, too little to claim one.
func (t Token) String() string { return hex.EncodeToString(t[:4]) }

// Offer is the host's end: it presents t on conn and returns once the guest
// keeps the connection under it. It ends when ctx does; conn is then of no
// further use and the caller closes it.
func Offer(ctx context.Context, conn net.Conn, t Token) error {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // closed or done
	defer stop()
	if _, err := conn.Write(append([]byte(magic), t[:]...)); err != nil {
		return fmt.Errorf("offer stream %s: %w", t, cause(ctx, err))
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return fmt.Errorf("offer stream %s: %w", t, cause(ctx, err))
	}
	if answer[0] != answerOK {
		return fmt.Errorf("offer stream %s: guest answered %d: %w", t, answer[0], ErrHandshake)
	}
	if !stop() && ctx.Err() != nil {
		return fmt.Errorf("offer stream %s: %w", t, context.Cause(ctx))
	}
	return nil
}

// cause prefers why ctx ended to the deadline error that followed from it.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// ReadToken is the first half of the guest's end: it reads the handshake from a
// fresh connection. The caller files the connection and then calls Answer.
func ReadToken(conn net.Conn) (Token, error) {
	conn.SetReadDeadline(time.Now().Add(handshakeTimeout)) //nolint:errcheck // a closed conn fails in the read
	defer conn.SetReadDeadline(time.Time{})                //nolint:errcheck // likewise
	var b [len(magic) + TokenLen]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return Token{}, fmt.Errorf("read stream handshake: %w", err)
	}
	if string(b[:len(magic)]) != magic {
		return Token{}, fmt.Errorf("read stream handshake: %w", ErrHandshake)
	}
	return Token(b[len(magic):]), nil
}

// Answer tells the host whether the guest keeps the connection.
func Answer(conn net.Conn, ok bool) error {
	b := []byte{answerOK}
	if !ok {
		b[0] = answerBad
	}
	_, err := conn.Write(b)
	return err
}
