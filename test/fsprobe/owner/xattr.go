package owner

import (
	"bytes"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

func xattr(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	set := func(name string, length, flags int) string {
		return try.Result(unix.Lsetxattr(path, name, bytes.Repeat([]byte("v"), length), flags))
	}
	t.Say("set", set("user.one", 5, 0))
	t.Say("get", Attribute(path, "user.one"))
	t.Say("create again", set("user.one", 1, unix.XATTR_CREATE))
	t.Say("replace", set("user.one", 7, unix.XATTR_REPLACE)+", "+Attribute(path, "user.one"))
	t.Say("replace a missing one", set("user.two", 1, unix.XATTR_REPLACE))
	t.Say("empty value", set("user.empty", 0, 0)+", "+Attribute(path, "user.empty"))
	t.Say("1000 bytes", set("user.large", 1000, 0)+", "+Attribute(path, "user.large"))
	t.Say("65537 bytes", set("user.huge", 65537, 0))
	t.Say("longest name", set("user."+strings.Repeat("n", 250), 1, 0))
	t.Say("name too long", set("user."+strings.Repeat("n", 251), 1, 0))
	t.Say("name of odd bytes", set("user.\x01\xff\n ", 1, 0))
	t.Say("list", attributes(path))
	_, err = unix.Lgetxattr(path, "user.large", make([]byte, 10))
	t.Say("get into too little", try.Result(err))
	t.Say("get a missing one", Attribute(path, "user.missing"))
	t.Say("remove", try.Result(unix.Lremovexattr(path, "user.one")))
	t.Say("remove again", try.Result(unix.Lremovexattr(path, "user.one")))
	t.Say("no name space", set("nonsense", 1, 0))
	t.Say("unknown name space", set("unknown.name", 1, 0))
	if err := os.Mkdir(t.Path("dir"), 0o755); err != nil {
		return err
	}
	t.Say("of a directory", try.Result(unix.Lsetxattr(t.Path("dir"), "user.d", []byte("x"), 0))+", "+Attribute(t.Path("dir"), "user.d"))
	if err := os.Symlink("file", t.Path("link")); err != nil {
		return err
	}
	t.Say("of a symbolic link", try.Result(unix.Lsetxattr(t.Path("link"), "user.l", []byte("x"), 0)))
	t.Say("through a symbolic link", Attribute(t.Path("link"), "user.large")+", "+func() string {
		n, err := unix.Getxattr(t.Path("link"), "user.large", make([]byte, 2000))
		return try.Result(err) + ", " + try.Yes(n == 1000)
	}())
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	t.Say("unlink", try.Result(os.Remove(path)))
	t.Say("of an unlinked file", try.Result(unix.Fsetxattr(int(f.Fd()), "user.gone", []byte("x"), 0)))
	return nil
}

// Attribute is the value of an extended attribute.
func Attribute(path, name string) string {
	buf := make([]byte, 70000)
	n, err := unix.Lgetxattr(path, name, buf)
	if err != nil {
		return try.Result(err)
	}
	return try.Text(buf[:n])
}

// attributes are the names of a file's user.* and trusted.* attributes, sorted:
// the others are not the program's own.
func attributes(path string) string {
	buf := make([]byte, 70000)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return try.Result(err)
	}
	names := slices.DeleteFunc(strings.Split(string(buf[:n]), "\x00"), func(name string) bool {
		return !strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "trusted.")
	})
	slices.Sort(names)
	return try.Text([]byte(strings.Join(names, " ")))
}

// netRaw is a value of security.capability: version 2, cap_net_raw=ep.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// capability is what makes ping work for users.
func capability(t *try.T) error {
	const name = "security.capability"
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	t.Say("set", try.Result(unix.Lsetxattr(path, name, []byte(netRaw), 0)))
	t.Say("get", Attribute(path, name))
	t.Say("broken value", try.Result(unix.Lsetxattr(path, name, []byte("xyz"), 0)))
	t.Say("link", try.Result(os.Link(path, t.Path("link")))+", "+Attribute(t.Path("link"), name))
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString("changed")
	t.Say("after a write", try.Result(err)+", "+Attribute(path, name))
	t.Say("set again", try.Result(unix.Lsetxattr(path, name, []byte(netRaw), 0)))
	t.Say("after chown", try.Result(unix.Chown(path, -1, fsGroup))+", "+Attribute(path, name))
	t.Say("remove", try.Result(unix.Lremovexattr(path, name)))
	return nil
}

func privilegedXattr(t *try.T) error {
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	for _, name := range []string{"trusted.probe", "security.probe"} {
		t.Say("set "+name, try.Result(unix.Lsetxattr(path, name, []byte("x"), 0)))
		t.Say("get "+name, Attribute(path, name))
		t.Say("remove "+name, try.Result(unix.Lremovexattr(path, name)))
	}
	return nil
}

// An ACL in its attribute's form: version 2; the owner rw, user 1000 rw, the
// group r, mask rw, others nothing.
const aclValue = "\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x06\x00\xe8\x03\x00\x00" + "\x04\x00\x04\x00\xff\xff\xff\xff" +
	"\x10\x00\x06\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"

func acl(t *try.T) error {
	const name, inherited = "system.posix_acl_access", "system.posix_acl_default"
	path, err := t.File("file", "text")
	if err != nil {
		return err
	}
	t.Say("get where there is none", Attribute(path, name))
	t.Say("set", try.Result(unix.Lsetxattr(path, name, []byte(aclValue), 0)))
	t.Say("get", Attribute(path, name))
	t.Say("mode", try.Mode(path))
	dir := t.Path("dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	t.Say("set for what comes", try.Result(unix.Lsetxattr(dir, inherited, []byte(aclValue), 0)))
	below, err := t.File("dir/file", "")
	if err != nil {
		return err
	}
	t.Say("inherited", try.Mode(below)+", "+Attribute(below, name))
	return nil
}
