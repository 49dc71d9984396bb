package try

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Peer is another process that does what it is told, one command at a time:
//
//	fsprobe peer
//
// Commands are lines of words, as are answers; see verbs.
type Peer struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	answers *bufio.Scanner
}

// PeerCommand is the first argument of a program that is to be a peer.
const PeerCommand = "peer"

// Peer starts a peer in the directory of the try, so that names in commands are
// relative to it. Its credential is that of the program where it is nil.
func (t *T) Peer(as *syscall.Credential) (*Peer, error) {
	cmd := exec.Command("/proc/self/exe", PeerCommand)
	cmd.Dir, cmd.Stderr = t.Dir, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &Peer{cmd: cmd, in: in, answers: bufio.NewScanner(out)}, nil
}

// Do has the peer carry out a command, and returns its answer.
func (p *Peer) Do(words ...string) string {
	p.Begin(words...)
	return p.Answer()
}

// Begin is Do without waiting for the answer.
func (p *Peer) Begin(words ...string) {
	fmt.Fprintln(p.in, strings.Join(words, " ")) //nolint:errcheck // no answer tells
}

// Answer to the command that was begun; of a peer that has ended, how.
func (p *Peer) Answer() string {
	if p.answers.Scan() {
		return p.answers.Text()
	}
	return fmt.Sprintf("it ended: %v", errors.Join(p.answers.Err(), p.End()))
}

// End has the peer exit, which closes what it has open.
func (p *Peer) End() error {
	p.in.Close()
	if p.cmd.ProcessState != nil {
		return nil
	}
	return p.cmd.Wait()
}

// Serve is a peer's life.
func Serve(in io.Reader, out io.Writer) error {
	h := &hands{}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		do, ok := verbs()[words[0]]
		if !ok {
			return fmt.Errorf("no verb is named %q", words[0])
		}
		answer, err := do(h, words[1:])
		if err != nil {
			answer = Result(err)
		}
		if answer == "" {
			answer = "ok"
		}
		if _, err := fmt.Fprintln(out, answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

// hands are what a peer holds: one file and one mapping.
type hands struct {
	fd     int
	mapped []byte
}

// verbs are what a peer can be told. Empty answers are for "ok".
func verbs() map[string]func(h *hands, args []string) (string, error) {
	return map[string]func(h *hands, args []string) (string, error){
		"open": func(h *hands, args []string) (string, error) {
			flags := map[string]int{
				"r": unix.O_RDONLY, "w": unix.O_WRONLY, "rw": unix.O_RDWR, "create": unix.O_RDWR | unix.O_CREAT,
				"append": unix.O_WRONLY | unix.O_APPEND, "w-nonblock": unix.O_WRONLY | unix.O_NONBLOCK,
			}
			fd, err := unix.Open(args[0], flags[args[1]]|unix.O_CLOEXEC, 0o666)
			h.fd = fd
			return "", err
		},
		"close": func(h *hands, _ []string) (string, error) { return "", unix.Close(h.fd) },
		"read": func(h *hands, args []string) (string, error) {
			buf := make([]byte, number(args[0]))
			n, err := unix.Read(h.fd, buf)
			return Text(buf[:max(n, 0)]), err
		},
		"write": func(h *hands, args []string) (string, error) {
			_, err := unix.Write(h.fd, []byte(args[0]))
			return "", err
		},
		"pread": func(h *hands, args []string) (string, error) {
			buf := make([]byte, number(args[1]))
			n, err := unix.Pread(h.fd, buf, number(args[0]))
			return Text(buf[:max(n, 0)]), err
		},
		// lines FIRST N: writes N numbered lines.
		"lines": func(h *hands, args []string) (string, error) {
			for i := range number(args[1]) {
				if _, err := unix.Write(h.fd, fmt.Appendf(nil, "%s line %06d\n", args[0], i)); err != nil {
					return "", err
				}
			}
			return "", nil
		},
		"mmap": func(h *hands, args []string) (string, error) {
			how := map[string]int{"shared": unix.MAP_SHARED, "private": unix.MAP_PRIVATE}[args[1]]
			var err error
			h.mapped, err = unix.Mmap(h.fd, 0, int(number(args[0])), unix.PROT_READ|unix.PROT_WRITE, how)
			return "", err
		},
		"peek": func(h *hands, args []string) (string, error) {
			at, n := number(args[0]), number(args[1])
			return peek(h.mapped[at : at+n]), nil
		},
		"poke": func(h *hands, args []string) (string, error) {
			copy(h.mapped[number(args[0]):], args[1])
			return "", nil
		},
		"msync": func(h *hands, _ []string) (string, error) { return "", unix.Msync(h.mapped, unix.MS_SYNC) },
		"flock": func(h *hands, args []string) (string, error) {
			how := map[string]int{
				"shared": unix.LOCK_SH, "exclusive": unix.LOCK_EX, "try-shared": unix.LOCK_SH | unix.LOCK_NB,
				"try-exclusive": unix.LOCK_EX | unix.LOCK_NB, "unlock": unix.LOCK_UN,
			}
			return "", unix.Flock(h.fd, how[args[0]])
		},
		// lock OP TYPE START LENGTH
		"lock": func(h *hands, args []string) (string, error) {
			op := map[string]int{
				"try": unix.F_SETLK, "wait": unix.F_SETLKW, "get": unix.F_GETLK,
				"ofd-try": unix.F_OFD_SETLK, "ofd-wait": unix.F_OFD_SETLKW, "ofd-get": unix.F_OFD_GETLK,
			}[args[0]]
			kind := map[string]int16{"read": unix.F_RDLCK, "write": unix.F_WRLCK, "unlock": unix.F_UNLCK}[args[1]]
			l := unix.Flock_t{Type: kind, Whence: io.SeekStart, Start: number(args[2]), Len: number(args[3])}
			if err := unix.FcntlFlock(uintptr(h.fd), op, &l); err != nil || op != unix.F_GETLK && op != unix.F_OFD_GETLK {
				return "", err
			}
			if l.Type == unix.F_UNLCK {
				return "free", nil
			}
			return fmt.Sprintf("held: type %d from %d, %d bytes, by a process: %s", l.Type, l.Start, l.Len, Yes(l.Pid > 0)), nil
		},
		"make": func(_ *hands, args []string) (string, error) {
			bits, err := strconv.ParseUint(args[1], 8, 32)
			if err != nil {
				return "", err
			}
			return "", unix.Mknod(args[0], unix.S_IFREG|uint32(bits), 0)
		},
		"mkdir":  func(_ *hands, args []string) (string, error) { return "", unix.Mkdir(args[0], 0o777) },
		"unlink": func(_ *hands, args []string) (string, error) { return "", unix.Unlink(args[0]) },
		"rename": func(_ *hands, args []string) (string, error) { return "", unix.Rename(args[0], args[1]) },
		"link":   func(_ *hands, args []string) (string, error) { return "", unix.Link(args[0], args[1]) },
		"stat": func(_ *hands, args []string) (string, error) {
			return Mode(args[0]), nil
		},
		"list": func(_ *hands, args []string) (string, error) {
			entries, err := os.ReadDir(args[0])
			return fmt.Sprintf("%d entries", len(entries)), err
		},
		"chmod": func(_ *hands, args []string) (string, error) {
			bits, err := strconv.ParseUint(args[1], 8, 32)
			if err != nil {
				return "", err
			}
			return "", unix.Chmod(args[0], uint32(bits))
		},
		"chgrp": func(_ *hands, args []string) (string, error) {
			return "", unix.Chown(args[0], -1, int(number(args[1])))
		},
		"truncate": func(_ *hands, args []string) (string, error) { return "", unix.Truncate(args[0], number(args[1])) },
		"touch": func(_ *hands, args []string) (string, error) {
			return "", unix.UtimesNanoAt(unix.AT_FDCWD, args[0], nil, 0)
		},
		"connect": func(h *hands, args []string) (string, error) {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return "", err
			}
			h.fd = fd
			return "", unix.Connect(fd, &unix.SockaddrUnix{Name: args[0]})
		},
	}
}

// peek is what memory holds, or "fault" where the file has ended before it.
func peek(memory []byte) (seen string) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			seen = "fault"
		}
	}()
	return Text(memory)
}

// number of a command; what is none is 0, and the output shows it.
func number(word string) int64 {
	n, _ := strconv.ParseInt(word, 10, 64)
	return n
}
