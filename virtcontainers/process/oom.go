package process

import (
	"sync"
	"time"
)

// oomPause is how long a container's next OOM is not told of: a guest in distress, or a
// hostile one, reports without end.
const oomPause = time.Second

// OOMs are the times that a container ran out of memory. One that comes before its exit
// is told before it.
type OOMs struct {
	mu    sync.Mutex
	count uint64    // that the guest has told of
	last  time.Time // that clients were to be told of
	due   bool      // clients have not been told
	ended bool      // with the container; nothing follows
}

// Add notes what the guest has told, and reports whether clients are to be told.
func (o *OOMs) Add(now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.count++
	if o.ended || now.Sub(o.last) < oomPause {
		return false
	}
	o.due, o.last = true, now
	return true
}

// End notes the container's exit, up to which there were so many. What is on its way
// still has come in time, and is not told again.
func (o *OOMs) End(count uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.due = o.due || count > o.count
	o.ended = true
}

// Take reports whether clients are to be told, and takes it that they are.
func (o *OOMs) Take() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	due := o.due
	o.due = false
	return due
}
