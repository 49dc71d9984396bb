package virtiofs

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A Dialect is how a virtiofsd wants to be spoken to.
type Dialect int

// The two programs of the name virtiofsd.
const (
	// C is the one that came with QEMU up to 7.2.
	C Dialect = iota + 1
	// Rust is its successor, from virtio-fs.gitlab.io.
	Rust
)

func (d Dialect) String() string {
	switch d {
	case C:
		return "C"
	case Rust:
		return "Rust"
	}
	return "Dialect(" + strconv.Itoa(int(d)) + ")"
}

// versionLine is the first line of --version:
//
//	virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)     C
//	virtiofsd 1.13.2                                               Rust
var versionLine = regexp.MustCompile(`^virtiofsd (version )?((\d{1,4})\.(\d{1,4})\S*)`)

// A Version says which virtiofsd a program is.
type Version struct {
	Dialect Dialect
	// Number such as "7.2.22" of QEMU for C and "1.13.2" of its own for Rust.
	Number string
}

// parseVersion reads the output of --version.
func parseVersion(output string) (Version, error) {
	m := versionLine.FindStringSubmatch(output)
	if m == nil {
		first, _, _ := strings.Cut(output, "\n")
		return Version{}, fmt.Errorf("%.80q is no version of virtiofsd", first)
	}
	if m[1] != "" {
		return Version{C, m[2]}, nil
	}
	major, _ := strconv.Atoi(m[3])
	minor, _ := strconv.Atoi(m[4])
	if major < 1 || major == 1 && minor < 5 {
		return Version{}, fmt.Errorf("virtiofsd %s is too old: 1.5 or later is needed", m[2])
	}
	return Version{Rust, m[2]}, nil
}

// A Cache is how long the guest may rely on what it has read.
type Cache string

// The cache modes that both dialects have.
const (
	// CacheAuto revalidates names and attributes after a second, and contents
	// when a file is opened.
	CacheAuto Cache = "auto"
	// CacheAlways never looks again: for directories that only the guest changes.
	CacheAlways Cache = "always"
	// CacheNever keeps nothing in the guest.
	CacheNever Cache = "never"
)

// params is all that the command line depends on.
type params struct {
	fd             int // of the listening socket
	dir            string
	cache          Cache
	threadPoolSize int
	nofile         uint64
}

// args is the command line after the program's name. Both dialects share these
// decisions:
//
//   - The sandbox is the strictest, the daemon's own mount, pid and network
//     namespaces and seccomp; in C seccomp cannot be turned off.
//   - Extended attributes are on: a container's root has file capabilities, and
//     its user.* attributes are its own. trusted.* ones fail with EPERM, for they
//     want CAP_SYS_ADMIN in the daemon. POSIX ACLs are refused with EOPNOTSUPP,
//     which is Rust's default, and not stored without being enforced, which is
//     C's: guest kernel 6.1 knows none on announced submounts.
//   - Submounts are announced: below the directory each container's root is a
//     mount of its own, with inode numbers of its own.
//   - O_DIRECT reaches the host's file: it passes by the host's page cache too, and
//     refuses what is not aligned as it does on the host.
//   - Locks stay in the guest: every process that uses the directory is there,
//     and the daemon cannot wait for a lock without blocking others.
//   - Descriptors are limited, to what the process may have anyway, since the
//     daemon holds one for every inode that the guest knows. Raising the hard
//     limit would want CAP_SYS_RESOURCE.
func (d Dialect) args(p params) []string {
	fd, nofile, threads := strconv.Itoa(p.fd), strconv.FormatUint(p.nofile, 10), strconv.Itoa(p.threadPoolSize)
	if d == C {
		cache := string(p.cache)
		if p.cache == CacheNever {
			cache = "none"
		}
		return []string{
			"-f", "--fd=" + fd,
			"--thread-pool-size=" + threads,
			"--rlimit-nofile=" + nofile,
			"-o", strings.Join([]string{
				"source=" + optionEscaper.Replace(p.dir),
				"cache=" + cache,
				"sandbox=namespace",
				"xattr", "no_posix_acl",
				"announce_submounts",
				"no_flock", "no_posix_lock",
				"allow_direct_io",
				"log_level=warn",
			}, ","),
		}
	}
	return []string{
		"--fd=" + fd,
		"--shared-dir=" + p.dir,
		"--cache=" + string(p.cache),
		"--sandbox=namespace",
		"--seccomp=kill",
		"--xattr",
		"--announce-submounts",
		"--allow-direct-io",
		"--thread-pool-size=" + threads,
		"--rlimit-nofile=" + nofile,
		"--log-level=warn",
	}
}

// env is the daemon's whole environment. With a thread pool C is
// killed by its own seccomp filter when a ninth thread allocates: glibc 2.36 then
// asks by sched_getaffinity how many CPUs there are, to limit its arenas. It does
// not ask when it is told the limit. The library preloaded, if any, is for C alone.
func (d Dialect) env(preload string) []string {
	if d != C {
		return nil
	}
	env := []string{"MALLOC_ARENA_MAX=8"}
	if preload != "" {
		env = append(env, "LD_PRELOAD="+preload)
	}
	return env
}

// optionEscaper quotes a value within the list after C's -o.
var optionEscaper = strings.NewReplacer(`\`, `\\`, `,`, `\,`)
