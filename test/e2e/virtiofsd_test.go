package e2e

import (
	"testing"

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
