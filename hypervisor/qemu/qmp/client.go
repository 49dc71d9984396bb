// Package qmp is a client of QEMU's machine protocol.
//
// The protocol is JSON objects, one on a line:
//
//	QEMU    {"QMP": {"version": ..., "capabilities": [...]}}       greeting, once
//	client  {"execute": "qmp_capabilities", "id": 1}
//	QEMU    {"return": {}, "id": 1}
//	client  {"execute": CMD, "arguments": {...}, "id": N}          [+ a descriptor]
//	QEMU    {"return": VALUE, "id": N}
//	     or {"error": {"class": CLASS, "desc": TEXT}, "id": N}
//	QEMU    {"event": NAME, "data": {...}, "timestamp": {...}}     at any time
//
// QEMU is not trusted: lines are capped, replies without a command to them end
// the connection, events that nobody takes are dropped and counted.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

const (
	// maxLine is the longest line taken from QEMU, in bytes. The longest of
	// interest is the answer to query-qmp-schema: 200 KiB in QEMU 7.2.
	maxLine = 1 << 20
	// maxEvents is how many events wait for a reader of Events.
	maxEvents = 256
	// maxEventData is the longest data of an event, in bytes, so that waiting
	// events take 4 MiB at most. Those of QEMU stay below 1 KiB.
	maxEventData = 16 << 10
)

// errClosed is how a connection ends by Close.
var errClosed = errors.New("qmp connection closed")

// A Client is one connection to QEMU. Its methods are safe for concurrent use.
type Client struct {
	conn    net.Conn
	version string
	events  chan Event
	done    chan struct{}
	writing chan struct{} // holds one element while a command is being written

	mu      sync.Mutex
	lastID  uint64
	pending map[uint64]chan message // each has room for the one reply
	err     error                   // why the connection ended; first cause
}

// New takes over a connection to QEMU, reads the greeting and negotiates. It
// closes conn when it fails; ctx bounds it. To pass descriptors conn must be a
// *net.UnixConn.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	c, lines := newClient(conn)
	if err := c.greet(ctx, lines); err != nil {
		conn.Close()
		return nil, fmt.Errorf("read qmp greeting: %w", err)
	}
	go c.read(lines) // ends with the connection
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, fmt.Errorf("negotiate qmp: %w", err)
	}
	return c, nil
}

func newClient(conn net.Conn) (*Client, *bufio.Scanner) {
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	return &Client{
		conn:    conn,
		events:  make(chan Event, maxEvents),
		done:    make(chan struct{}),
		writing: make(chan struct{}, 1),
		pending: make(map[uint64]chan message),
	}, lines
}

func (c *Client) greet(ctx context.Context, lines *bufio.Scanner) error {
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	err := func() error {
		if !lines.Scan() {
			return scanError(lines)
		}
		var g greeting
		if err := json.Unmarshal(lines.Bytes(), &g); err != nil {
			return err
		}
		if g.QMP == nil {
			return fmt.Errorf("not a greeting: %s", clean(lines.Text()))
		}
		v := g.QMP.Version.QEMU
		c.version = fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
		return nil
	}()
	if !stop() { // ctx ended, and the connection with it
		return context.Cause(ctx)
	}
	return err
}

// Version of QEMU, such as "7.2.22".
func (c *Client) Version() string { return c.version }

// Events delivers QEMU's events in their order and is closed when the connection
// ends. It holds 256; when it is full the oldest is dropped, so that a slow reader
// holds up no reply.
func (c *Client) Events() <-chan Event { return c.events }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended, after Done; it is nil after Close.
func (c *Client) Err() error {
	err := c.cause()
	if errors.Is(err, errClosed) {
		return nil
	}
	return err
}

// Close ends the connection and waits until nothing of the client runs. Commands
// in flight fail. It is idempotent.
func (c *Client) Close() error {
	c.fail(errClosed)
	<-c.done
	return nil
}

// Execute runs a command and decodes its value into result. args is anything that
// encodes to a JSON object, or nil; result may be nil. QEMU's refusal is an *Error;
// when the connection ends, the error is an errdefs.ErrUnavailable. When ctx ends
// first QEMU may still carry out the command.
func (c *Client) Execute(ctx context.Context, cmd string, args, result any) error {
	return c.execute(ctx, cmd, args, result, nil)
}

// ExecuteFile runs a command that takes a descriptor, such as getfd or add-fd.
// QEMU gets its own copy of it.
func (c *Client) ExecuteFile(ctx context.Context, cmd string, args, result any, file *os.File) error {
	if _, ok := c.conn.(*net.UnixConn); !ok {
		return fmt.Errorf("qmp %s: pass descriptor over a %T: %w", cmd, c.conn, errdefs.ErrInvalidArgument)
	}
	return c.execute(ctx, cmd, args, result, file)
}

func (c *Client) execute(ctx context.Context, cmd string, args, result any, file *os.File) error {
	id, reply, err := c.register()
	if err != nil {
		return fmt.Errorf("qmp %s: %w", cmd, err)
	}
	defer c.forget(id)
	line, err := json.Marshal(command{Execute: cmd, Arguments: args, ID: id})
	if err != nil {
		return fmt.Errorf("qmp %s: encode arguments: %w", cmd, err)
	}
	if err := c.write(ctx, append(line, '\n'), file); err != nil {
		return fmt.Errorf("qmp %s: %w", cmd, err)
	}
	select {
	case m := <-reply:
		return m.decode(cmd, result)
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: wait for the reply: %w", cmd, context.Cause(ctx))
	case <-c.done:
	}
	select {
	case m := <-reply: // it was the last thing that came
		return m.decode(cmd, result)
	default:
		return fmt.Errorf("qmp %s: %w", cmd, c.cause())
	}
}

func (m message) decode(cmd string, result any) error {
	if m.Error != nil {
		return &Error{Command: cmd, Class: clean(m.Error.Class), Desc: clean(m.Error.Desc)}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("qmp %s: decode the reply: %w", cmd, err)
	}
	return nil
}

func (c *Client) register() (uint64, chan message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	c.lastID++
	reply := make(chan message, 1)
	c.pending[c.lastID] = reply
	return c.lastID, reply, nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// write sends one line whole, with the descriptor on its first byte. A line cut
// short, by an error or by ctx, leaves the stream useless and ends it.
func (c *Client) write(ctx context.Context, line []byte, file *os.File) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.cause()
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0)) // in the past: ends the write below
		close(fired)
	})
	n, err := writeLine(c.conn, line, file)
	if !stop() {
		<-fired
		_ = c.conn.SetWriteDeadline(time.Time{})
		if err != nil {
			err = context.Cause(ctx)
		}
	}
	if err == nil || n == 0 && ctx.Err() != nil {
		return err
	}
	err = fmt.Errorf("write cut short after %d of %d bytes: %w", n, len(line), err)
	c.fail(err)
	return err
}

func writeLine(conn net.Conn, line []byte, file *os.File) (int, error) {
	if file == nil {
		return conn.Write(line)
	}
	raw, err := file.SyscallConn() // Fd would make the caller's file blocking
	if err != nil {
		return 0, err
	}
	var n int
	var sendErr error
	err = raw.Control(func(fd uintptr) {
		n, _, sendErr = conn.(*net.UnixConn).WriteMsgUnix(line, unix.UnixRights(int(fd)), nil)
	})
	if err = errors.Join(err, sendErr); err != nil || n == len(line) {
		return n, err
	}
	m, err := conn.Write(line[n:])
	return n + m, err
}

// read is the connection's reader, and the only sender of events.
func (c *Client) read(lines *bufio.Scanner) {
	defer close(c.done)
	defer close(c.events)
	var lost uint64
	for lines.Scan() {
		var m message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			c.fail(fmt.Errorf("garbage from QEMU: %w", err))
			return
		}
		switch {
		case m.Event == "":
			if err := c.deliver(m); err != nil {
				c.fail(err)
				return
			}
		case len(m.Event)+len(m.Data) > maxEventData:
			c.fail(fmt.Errorf("event from QEMU above %d bytes", maxEventData))
			return
		default:
			lost = c.publish(m, lost)
		}
	}
	c.fail(scanError(lines))
}

// publish queues an event and returns how many were dropped in all.
func (c *Client) publish(m message, lost uint64) uint64 {
	for {
		e := Event{
			Name: m.Event, Data: m.Data, Lost: lost,
			Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000),
		}
		select {
		case c.events <- e:
			return lost
		default:
		}
		select {
		case <-c.events:
			lost++
		default: // a reader was faster
		}
	}
}

// deliver hands a reply to its command. The command may have been given up.
func (c *Client) deliver(m message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.ID == nil || *m.ID == 0 || *m.ID > c.lastID || (m.Return == nil) == (m.Error == nil) {
		return errors.New("garbage from QEMU: a line that is neither an event nor the reply to a command")
	}
	if reply, ok := c.pending[*m.ID]; ok {
		delete(c.pending, *m.ID)
		reply <- m
	}
	return nil
}

// fail ends the connection; the first cause stays.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	c.mu.Unlock()
	c.conn.Close()
}

// cause is why the connection ended.
func (c *Client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func scanError(lines *bufio.Scanner) error {
	switch err := lines.Err(); {
	case err == nil:
		return fmt.Errorf("QEMU closed the connection: %w", io.EOF)
	case errors.Is(err, bufio.ErrTooLong):
		return fmt.Errorf("line from QEMU above %d bytes", maxLine)
	default:
		return err
	}
}
