package owner

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

// Ids that the tests give the program as a user, and others that are nobody's.
const (
	user, group, fsGroup  = 1000, 1000, 2000
	otherUser, otherGroup = 1234, 4321
)

// owner is how new names get owner, group and mode.
func owner(t *try.T) error {
	for _, mask := range []int{0o022, 0o077, 0o007, 0} {
		unix.Umask(mask)
		for _, kind := range []struct {
			name string
			make func(path string) error
		}{
			{"file", func(path string) error {
				fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o666)
				if err == nil {
					err = unix.Close(fd)
				}
				return err
			}},
			{"directory", func(path string) error { return unix.Mkdir(path, 0o777) }},
			{"fifo", func(path string) error { return unix.Mkfifo(path, 0o666) }},
			{"symlink", func(path string) error { return unix.Symlink("target", path) }},
		} {
			name := fmt.Sprintf("%s under umask %03o", kind.name, mask)
			path := t.Path(fmt.Sprintf("%s-%03o", kind.name, mask))
			t.Say(name, try.Result(kind.make(path))+", "+try.Mode(path))
		}
	}
	unix.Umask(0o022)
	return nil
}

func chown(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	if err := os.Symlink("file", t.Path("link")); err != nil {
		return err
	}
	for _, to := range []struct{ uid, gid int }{{-1, fsGroup}, {-1, otherGroup}, {otherUser, -1}, {otherUser, otherGroup}, {0xfffffffe, 0xfffffffe}} {
		t.Say(fmt.Sprintf("to %d:%d", to.uid, to.gid), try.Result(unix.Chown(path, to.uid, to.gid))+", "+try.Mode(path))
	}
	t.Say("of a symbolic link", try.Result(unix.Lchown(t.Path("link"), otherUser, otherGroup))+", "+try.Mode(t.Path("link"))+", "+try.Mode(path))
	return nil
}

// setID is when set-user-ID and set-group-ID bits are kept, and when they go.
func setID(t *try.T) error {
	for _, change := range []struct {
		name string
		do   func(path string, fd int) error
	}{
		{"chmod", func(string, int) error { return nil }},
		{"write", func(_ string, fd int) error { _, err := unix.Write(fd, []byte("x")); return err }},
		{"truncate", func(path string, _ int) error { return unix.Truncate(path, 1) }},
		{"fallocate", func(_ string, fd int) error { return unix.Fallocate(fd, 0, 0, 4096) }},
		{"chgrp", func(path string, _ int) error { return unix.Chown(path, -1, group) }},
		{"chown to nobody new", func(path string, _ int) error { return unix.Chown(path, -1, -1) }},
		{"rename", func(path string, _ int) error { return unix.Rename(path, path) }},
		{"write by another user", func(path string, _ int) error {
			p, err := t.Peer(&syscall.Credential{Uid: otherUser, Gid: otherGroup})
			if err != nil {
				return err
			}
			defer p.End() //nolint:errcheck // it has answered
			t.Say("another user's open", p.Do("open", path, "rw"))
			t.Say("another user's write", p.Do("write", "text"))
			return nil
		}},
		{"truncate by another user", func(path string, _ int) error {
			p, err := t.Peer(&syscall.Credential{Uid: otherUser, Gid: otherGroup})
			if err != nil {
				return err
			}
			defer p.End() //nolint:errcheck // it has answered
			t.Say("another user's truncate", p.Do("truncate", path, "2"))
			return nil
		}},
	} {
		path, err := t.File("file", "text")
		if err != nil {
			return err
		}
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		for _, bits := range []uint32{0o6777, 0o2767} {
			if err := unix.Chmod(path, bits); err != nil {
				return err
			}
			t.Say(fmt.Sprintf("%04o after %s", bits, change.name), try.Result(change.do(path, fd))+", "+try.Mode(path))
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	path, err := t.File("of-others-group", "")
	if err != nil {
		return err
	}
	t.Say("g+s", try.Result(unix.Chmod(path, 0o2755))+", "+try.Mode(path))
	t.Say("sticky on a file", try.Result(unix.Chmod(path, 0o1755))+", "+try.Mode(path))
	return nil
}

// setgidDirectory is what a volume with an fsGroup relies on.
func setgidDirectory(t *try.T) error {
	dir := t.Path("shared")
	if err := os.Mkdir(dir, 0o777); err != nil {
		return err
	}
	t.Say("chgrp", try.Result(unix.Chown(dir, -1, fsGroup)))
	t.Say("chmod", try.Result(unix.Chmod(dir, 0o2775))+", "+try.Mode(dir))
	inside := func(p *try.Peer, who string) {
		name := "shared/" + who
		t.Say("file by "+who, p.Do("open", name, "create")+", "+p.Do("write", "text")+", "+try.Mode(t.Path(name)))
		t.Say("directory by "+who, p.Do("mkdir", name+"-dir")+", "+try.Mode(t.Path(name+"-dir")))
		t.Say("below it", p.Do("open", name+"-dir/file", "create")+", "+try.Mode(t.Path(name+"-dir/file")))
		t.Say("file with g+s by "+who, p.Do("make", name+"-setgid", "2775")+", "+try.Mode(t.Path(name+"-setgid")))
		t.Say("rename by "+who, p.Do("rename", name, name+"-renamed"))
		t.Say("unlink by "+who, p.Do("unlink", name+"-renamed"))
	}
	return asEach(t, inside)
}

// asEach calls f with a peer for each of the users that the program may become:
// itself alone where it is not root.
func asEach(t *try.T, f func(p *try.Peer, who string)) error {
	for _, as := range []struct {
		who string
		c   *syscall.Credential
	}{
		{"itself", nil},
		{"the-user", &syscall.Credential{Uid: user, Gid: group}},
		{"a-member", &syscall.Credential{Uid: user, Gid: group, Groups: []uint32{5, fsGroup, 6}}},
		{"another", &syscall.Credential{Uid: otherUser, Gid: otherGroup}},
	} {
		if as.c != nil && os.Geteuid() != 0 {
			continue
		}
		p, err := t.Peer(as.c)
		if err != nil {
			return err
		}
		f(p, as.who)
		if err := p.End(); err != nil {
			return err
		}
	}
	return nil
}

// access is who may do what by owner, group and others.
func access(t *try.T) error {
	modes := []uint32{0o000, 0o600, 0o440, 0o060, 0o004, 0o007}
	for _, bits := range modes {
		dir := fmt.Sprintf("dir-%03o", bits)
		if err := os.Mkdir(t.Path(dir), 0o777); err != nil {
			return err
		}
		for _, name := range []string{fmt.Sprintf("file-%03o", bits), dir + "/inside"} {
			if _, err := t.File(name, "text"); err != nil {
				return err
			}
		}
		for _, name := range []string{fmt.Sprintf("file-%03o", bits), dir} {
			if err := errors.Join(unix.Chown(t.Path(name), -1, fsGroup), unix.Chmod(t.Path(name), looked(bits))); err != nil {
				return err
			}
		}
	}
	return asEach(t, func(p *try.Peer, who string) {
		for _, bits := range modes {
			file, dir := fmt.Sprintf("file-%03o", bits), fmt.Sprintf("dir-%03o", bits)
			t.Say(fmt.Sprintf("%03o of %s", bits, who), fmt.Sprintf("read %s, write %s, list %s, look %s, create %s, chmod %s, chgrp %s, touch %s, truncate %s",
				p.Do("open", file, "r"), p.Do("open", file, "w"), p.Do("list", dir), p.Do("stat", dir+"/inside"), p.Do("mkdir", dir+"/"+who),
				p.Do("chmod", file, fmt.Sprintf("%o", looked(bits))), p.Do("chgrp", file, fmt.Sprint(fsGroup)), p.Do("touch", file), p.Do("truncate", file, "4")))
		}
	})
}

// looked are permissions by which whoever may read a directory may also enter it.
func looked(bits uint32) uint32 { return bits | bits&0o444>>2 }

// sticky is whose files may go from a directory like /tmp.
func sticky(t *try.T) error {
	dir := t.Path("tmp")
	if err := os.Mkdir(dir, 0o777); err != nil {
		return err
	}
	if err := unix.Chmod(dir, 0o1777); err != nil {
		return err
	}
	if _, err := t.File("tmp/mine", ""); err != nil {
		return err
	}
	return asEach(t, func(p *try.Peer, who string) {
		t.Say("rename by "+who, p.Do("rename", "tmp/mine", "tmp/mine"+who))
		t.Say("back", try.Result(os.Rename(t.Path("tmp/mine"+who), t.Path("tmp/mine"))))
		t.Say("own file of "+who, p.Do("open", "tmp/"+who, "create")+", "+try.Mode(t.Path("tmp/"+who))+", "+p.Do("unlink", "tmp/"+who))
	})
}

// execute is whether a program on the file system runs.
func execute(t *try.T) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	path := t.Path("program")
	if err := os.WriteFile(path, self, 0o644); err != nil {
		return err
	}
	t.Say("0644", try.Result(exec.Command(path, try.PeerCommand).Run()))
	if err := os.Chmod(path, 0o755); err != nil {
		return err
	}
	t.Say("0755", try.Result(exec.Command(path, try.PeerCommand).Run()))
	cmd := exec.Command(path, try.PeerCommand)
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	_, err = os.OpenFile(path, os.O_WRONLY, 0)
	t.Say("write while it runs", try.Result(err))
	t.Say("unlink while it runs", try.Result(os.Remove(path)))
	in.Close()
	t.Say("its end", try.Result(cmd.Wait()))
	return nil
}
