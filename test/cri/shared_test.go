package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestEmptyDirsBelongToThePod(t *testing.T) {
	const size = 4 << 20
	each(t, setup{}, func(e *env) {
		k := e.kubelet("empty")
		empty, memory := k.emptyDir("empty"), k.memory("memory", size)
		p := e.run("empty")
		mounts := with(rw(empty, "/empty"), rw(memory, "/memory"))
		p.start("init", "for d in /empty /memory; do echo of init > $d/init; mkdir -m 700 $d/d; done", mounts).exited()
		first := p.start("first", "cp /memory/init /memory/first", mounts)
		first.exited()
		first.remove()

		a, b := p.start("a", idle, e.probe(), mounts), p.start("b", idle, e.probe(), mounts)
		a.want("cat /empty/init /memory/init /memory/first; stat -c %a /empty /memory /memory/d", "of init\nof init\nof init\n777\n1777\n700")
		a.want("grep -c ' /memory tmpfs ' /proc/mounts; df -k /memory | tail -n 1 | awk '{print $2}'", fmt.Sprintf("1\n%d", size>>10))
		a.sh("dd if=/dev/zero of=/empty/big bs=1M count=3 2>/dev/null; dd if=/dev/zero of=/memory/big bs=1M count=3 2>/dev/null")
		// What a kubelet counts is on the host, as far as it is not memory.
		var seen uint64
		k.must(filepath.WalkDir(empty, func(path string, entry os.DirEntry, err error) error {
			if err == nil && entry.Type().IsRegular() {
				var st unix.Stat_t
				err = unix.Stat(path, &st)
				seen += uint64(st.Blocks) * 512
			}
			return err
		}))
		if seen < 3<<20 {
			e.Errorf("the host counts %d bytes of what 3 MiB were written to", seen)
		}
		// Both count against one limit.
		r := b.exec("dd if=/dev/zero of=/memory/more bs=1M count=3")
		if r.code == 0 || !strings.Contains(r.stderr, "No space left on device") {
			e.Errorf("write to a full volume: %v", r)
		}
		a.want("rm /memory/more; cat /memory/init; echo again > /memory/again; cat /memory/again", "of init\nagain")
		entries, err := os.ReadDir(memory)
		k.must(err)
		if e.isHusk() && len(entries) > 0 {
			e.Errorf("the host's memory has %v", entries)
		}

		a.stop()
		a.remove()
		b.want("cat /empty/init /memory/again", "of init\nagain")
		b.stop()
		b.remove()
		c := p.start("c", idle, e.probe(), with(ro(memory, "/memory"), rw(empty, "/empty")))
		c.want("cat /memory/again", "again")
		if r := c.exec("echo > /memory/x"); r.code == 0 || !strings.Contains(r.stderr, "Read-only") {
			e.Errorf("write to read-only memory: %v", r)
		}
	})
}

// TestContainersMeetOnVolumes by sockets, FIFOs, locks and events, on all volumes to
// which more than one can write.
func TestContainersMeetOnVolumes(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("meet")
		host, memory := k.hostPath("dir"), k.memory("memory", 4<<20)
		volumes := map[string]string{
			"/host": host, "/empty": k.emptyDir("empty"), "/memory": memory,
			"/sub": k.subPath(k.emptyDir("other"), "sub", "a", 1), "/memory-sub": k.subPath(memory, "sub", "a", 2),
		}
		if data, err := os.ReadFile("/proc/filesystems"); err == nil && strings.Contains(string(data), "hugetlbfs") {
			volumes["/huge"] = k.hugePages("huge")
		}
		var at []string
		var writable, readable []*runtime.Mount
		for path, dir := range volumes {
			at = append(at, path)
			writable, readable = append(writable, rw(dir, path)), append(readable, ro(dir, path))
		}
		all := strings.Join(at, " ")
		p := e.run("meet")
		p.start("server", "exec /probe serve "+all, e.probe(), with(writable...)).waitOutput("serving\n")
		works := strings.Join(at, " works\n") + " works"
		p.start("user", idle, e.probe(), with(writable...)).want("/probe use "+all, works)
		p.start("reader", idle, e.probe(), with(readable...)).want("/probe use "+all, works)
	})
}

// TestHugePagesAreTheGuests maps some of a volume's. How many pages a container may
// have, CRI does not pass on.
func TestHugePagesAreTheGuests(t *testing.T) {
	const size = 4 << 20
	each(t, setup{husk: true}, func(e *env) {
		k := e.kubelet("huge")
		dir := k.hugePages("huge")
		p := e.run("huge")
		a, b := p.start("a", idle, e.probe(), with(rw(dir, "/huge"))), p.start("b", idle, with(rw(dir, "/huge")))
		a.want("grep -o ' /huge hugetlbfs ' /proc/mounts", "/huge hugetlbfs")
		a.want(fmt.Sprint("/probe huge /huge/f ", size), "filled")
		b.want("stat -c '%s %b %B' /huge/f", fmt.Sprintf("%d %d 512", size, size/512))
		b.sh("rm /huge/f")
		a.want(fmt.Sprint("/probe huge /huge/g ", size), "filled")
	})
}
