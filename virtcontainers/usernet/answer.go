package usernet

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// deathGrace is how long the end of a passt that has closed its socket may take to
// be seen.
const deathGrace = time.Second

// awaitAnswer asks passt for the gateway's MAC address, as the guest will, and
// returns when it has answered: its sandbox stands then. The error is passt's own
// reason where it ended instead.
func (n *Network) awaitAnswer(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		_ = n.stream.SetDeadline(time.Unix(1, 0)) // fails only on a closed file
	})
	err := n.exchange()
	if !stop() {
		return fmt.Errorf("wait for passt: %w", context.Cause(ctx))
	}
	if err == nil {
		return nil
	}
	select {
	case <-n.Done():
		return n.Err()
	case <-time.After(deathGrace):
		return err
	}
}

// exchange sends the request and reads frames up to the answer. What passt sends
// before that of its own accord, the guest does without.
func (n *Network) exchange() error {
	request := arpRequest(n.plan.mac)
	if _, err := n.stream.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...)); err != nil {
		return fmt.Errorf("write to passt: %w", err)
	}
	for {
		frame, err := readFrame(n.stream)
		if err != nil {
			return fmt.Errorf("read from passt: %w", err)
		}
		if isAnswer(frame) {
			return nil
		}
	}
}

// maxFrame is an Ethernet header before 65535 bytes, the most that any frame has.
const maxFrame = 14 + 65535

// readFrame reads one frame, which follows its length in four bytes, and nothing
// of the next.
func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > maxFrame {
		return nil, fmt.Errorf("a frame of %d bytes, of at most %d", length, maxFrame)
	}
	frame := make([]byte, length)
	_, err := io.ReadFull(r, frame)
	return frame, err
}

// What follows an Ethernet frame's two MAC addresses: the type ARP; then Ethernet,
// IPv4, their lengths, and the operation (RFC 826).
var (
	arpWho = []byte{0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1}
	arpIs  = []byte{0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 2}
)

// arpRequest asks everyone, in the guest's name, who has Gateway4.
func arpRequest(mac []byte) []byte {
	frame := bytes.Repeat([]byte{0xff}, 6)
	frame = append(frame, mac...)
	frame = append(frame, arpWho...)
	frame = append(frame, mac...)
	frame = append(frame, guest4.Addr().AsSlice()...)
	frame = append(frame, make([]byte, 6)...)
	return append(frame, Gateway4.AsSlice()...)
}

func isAnswer(frame []byte) bool {
	return len(frame) >= 32 && bytes.Equal(frame[12:22], arpIs) && bytes.Equal(frame[28:32], Gateway4.AsSlice())
}
