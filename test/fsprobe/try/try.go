// Package try is what probes of a file system are made of: a directory to try
// something in, other processes that do as they are told, and results as words.
package try

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A Probe is one property.
type Probe struct {
	Name string
	// Run tries it. An error is for what only prepares it.
	Run func(*T) error
}

// A T is one property being tried in one directory.
type T struct {
	// Out is where results are printed, each with Name in front.
	Out  io.Writer
	Name string
	// Dir is the property's own, absolute.
	Dir string
}

// Say prints what came of something.
func (t *T) Say(what, result string) {
	fmt.Fprintf(t.Out, "%s %s: %s\n", t.Name, what, result)
}

// Path is a name in the directory.
func (t *T) Path(name string) string { return filepath.Join(t.Dir, name) }

// File makes a file with contents.
func (t *T) File(name, contents string) (string, error) {
	path := t.Path(name)
	return path, os.WriteFile(path, []byte(contents), 0o644)
}

// Result names what an operation came to.
func Result(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

// Mode is what stat says of a name: type and permissions, in octal as in
// st_mode, owner and group.
func Mode(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return Result(err)
	}
	return fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
}

// Size is a file's length, or why it is not known.
func Size(path string) string {
	info, err := os.Lstat(path)
	if err != nil {
		return Result(err)
	}
	return fmt.Sprint(info.Size())
}

// Contents is a file's text, or a digest of a long one.
func Contents(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return Result(err)
	}
	return Text(data)
}

// Text is data in quotes, or their length and digest where they are long.
func Text(data []byte) string {
	if len(data) <= 64 {
		return fmt.Sprintf("%q", data)
	}
	return fmt.Sprintf("%d bytes, %s", len(data), Digest(data))
}

// Digest tells data from others.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// Yes is for a fact that holds or does not.
func Yes(fact bool) string {
	if fact {
		return "yes"
	}
	return "no"
}
