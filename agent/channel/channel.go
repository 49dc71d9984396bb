// Package channel is the guest's end of the connections between host and guest:
// vsock, or one virtio-serial port that carries numbered ports.
package channel

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
)

// A Channel connects the agent to its host. Methods are safe for concurrent use.
type Channel struct{ carrier carrier }

// A carrier is what Channel says, by one means.
type carrier interface {
	dialControl(ctx context.Context) (net.Conn, error)
	listen(port uint32) (net.Listener, error)
	close() error
}

// Open returns the channel that param asks for, the value of the kernel
// parameter husk.channel: "vsock:PORT" or "virtio-serial". For the latter it
// waits until the kernel has the port.
func Open(ctx context.Context, param string) (*Channel, error) {
	if param == "virtio-serial" {
		node, err := findPort(ctx)
		if err != nil {
			return nil, fmt.Errorf("find virtio-serial port %q: %w", portName, err)
		}
		return NewSerial(func(ctx context.Context) (io.ReadWriteCloser, error) { return openPort(ctx, node) }), nil
	}
	if value, ok := strings.CutPrefix(param, "vsock:"); ok {
		port, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("parse husk.channel=%s: %w", param, err)
		}
		return NewVsock(hostCID, uint32(port)), nil
	}
	return nil, fmt.Errorf("parse husk.channel=%s: want vsock:PORT or virtio-serial", param)
}

// DialControl connects to the host's control port. Over virtio-serial it waits
// until there is a host.
func (c *Channel) DialControl(ctx context.Context) (net.Conn, error) {
	conn, err := c.carrier.dialControl(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial host: %w", err)
	}
	return conn, nil
}

// Listen accepts the host's connections to a port of the guest, across
// reconnects. The host dials after the control connection is made: what it is to
// find there listens before DialControl. Accepted connections have a method
// CloseWrite() error.
func (c *Channel) Listen(port uint32) (net.Listener, error) {
	l, err := c.carrier.listen(port)
	if err != nil {
		return nil, fmt.Errorf("listen on guest port %d: %w", port, err)
	}
	return l, nil
}

// Close ends the channel with its listeners. Over virtio-serial the connections
// end too. It is idempotent.
func (c *Channel) Close() error { return c.carrier.close() }
