package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/daemon"
)

// More requests at once than virtiofsd has threads: each thread allocates, and none
// makes a call that the daemon's seccomp filter kills it for.
func TestRequestsAtOnceAreServedByAThreadPool(t *testing.T) {
	eachHusk(t, func(e *env) {
		e.configure(daemon.Settings{"hypervisor": {"virtiofsd_threads": 32}})
		const script = `cd /root
for i in $(seq 48); do dd if=/dev/zero of=f$i bs=64k count=16 oflag=direct 2>/dev/null & done
wait
cat f* | wc -c`
		if r := e.sh(script); r.stdout != "50331648\n" || r.stderr != "" || r.code != 0 {
			e.Errorf("%v, want the bytes of 48 files", r)
		}
	})
}

// A container creates files one after the other, and the host each at about the moment
// at which the container does: often after virtiofsd has found none there, and before it
// makes one.
func TestFilesAreCreatedByTheHostAndAContainerAtOnce(t *testing.T) {
	onNewestWithSandboxes(t, func(p *pod) {
		const files = 1500
		host := p.TempDir()
		p.run("")
		daemon := p.process("virtiofsd")
		id := p.detached("creates", "sleep 10000", append(bind(host, "/mnt/host", "rw"), "--sandbox", p.id)...)
		ended := p.runAhead(host)
		r := p.exec(id, "race", "sh", "-c", fmt.Sprintf(`cd /mnt/host
i=0
while [ $i -lt %d ]; do i=$((i+1)); echo text > $i; done
echo end > end && cat end`, files))
		if r.stdout != "end\n" || r.stderr != "" || r.code != 0 {
			p.Errorf("%v", r)
		}
		if first, err := ended(); err != nil || first == 0 || first == files {
			p.Errorf("the host was first with %d files of %d, %v", first, files, err)
		} else {
			p.Logf("the host was first with %d files", first)
		}
		for i := 1; i <= files; i++ {
			if data, err := os.ReadFile(filepath.Join(host, strconv.Itoa(i))); string(data) != "text\n" {
				p.Errorf("on the host file %d is %q, %v", i, data, err)
				break
			}
		}
		if again := p.process("virtiofsd"); again.PID != daemon.PID {
			p.Errorf("virtiofsd was %v, is %v", daemon, again)
		}
		p.stop()
		p.shutdown()
	})
}

// runAhead has the host create file n+1 of a directory when file n is written to, after
// some of the time that there was between the last two. ended stops that, and tells how
// many files were not there yet.
func (e *env) runAhead(dir string) (ended func() (first int, err error)) {
	e.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY)
	}
	if err != nil {
		e.Fatal(err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	first, result := 0, make(chan error, 1)
	go func() { // ends when events is closed
		result <- func() error {
			b := make([]byte, 1<<16)
			done, last, between := 0, time.Now(), time.Millisecond
			for {
				n, err := events.Read(b)
				if err != nil {
					return err
				}
				// Of several events the last one counts.
				name, at := "", time.Now()
				for rest := b[:n]; len(rest) > 0; {
					size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(rest[12:]))
					name = unix.ByteSliceToString(rest[unix.SizeofInotifyEvent:size])
					rest = rest[size:]
				}
				i, err := strconv.Atoi(name)
				if err != nil || i <= done { // truncated and written to, or the end
					continue
				}
				done, last, between = i, at, at.Sub(last)
				for wait := rand.N(between + 1); time.Since(at) < wait; { // no timer is as fine
				}
				f, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(i+1)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
				if errors.Is(err, os.ErrExist) {
					continue
				}
				if err != nil {
					return err
				}
				f.Close()
				first++
			}
		}()
	}()
	return func() (int, error) {
		events.Close()
		err := <-result
		if errors.Is(err, os.ErrClosed) {
			err = nil
		}
		return first, err
	}
}
