package streams

import (
	"io"
	"net"
	"sync/atomic"
	"time"
)

// outflow copies one output stream from the guest and counts what it delivered.
// A nil *outflow is no stream.
type outflow struct {
	conn  net.Conn
	w     io.WriteCloser
	n     atomic.Uint64
	moved chan struct{} // a token after each write
	ended chan struct{}

	// promised is when the guest said how much it has sent; since then it was
	// waited for in reads for waited in all.
	promised atomic.Pointer[time.Time]
	waited   atomic.Int64 // nanoseconds
}

func newOutflow(conn net.Conn, w io.WriteCloser) *outflow {
	if conn == nil {
		return nil
	}
	return &outflow{conn: conn, w: w, moved: make(chan struct{}, 1), ended: make(chan struct{})}
}

// copy runs until the guest's end of the stream. A writer that fails is written
// to no more, but the guest's process is not blocked for it.
func (o *outflow) copy() {
	defer close(o.ended)
	defer o.w.Close()    //nolint:errcheck // every write was checked
	defer o.conn.Close() //nolint:errcheck // read to its end
	buf := make([]byte, copyBuffer)
	broken := false
	for {
		began := time.Now()
		n, err := o.conn.Read(buf)
		o.account(began)
		if n > 0 && !broken {
			_, werr := o.w.Write(buf[:n])
			broken = werr != nil
		}
		o.n.Add(uint64(n))
		select {
		case o.moved <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// account adds the time of a read since the promise to what was waited.
func (o *outflow) account(began time.Time) {
	promised := o.promised.Load()
	switch {
	case promised == nil:
	case began.After(*promised):
		o.waited.Add(int64(time.Since(began)))
	default:
		o.waited.Add(int64(time.Since(*promised)))
	}
}

func (o *outflow) promise(at time.Time) {
	if o != nil {
		o.promised.Store(&at)
	}
}

func (o *outflow) await(n uint64, patience time.Duration) {
	if o == nil {
		return
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for o.n.Load() < n && o.waited.Load() < int64(patience) {
		select {
		case <-o.moved:
			timer.Reset(patience)
		case <-o.ended:
			return
		case <-timer.C:
			return
		}
	}
}
