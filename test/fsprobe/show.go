package main

import (
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/owner"
	"github.com/husk-containers/husk/test/fsprobe/try"
)

// show prints all that can be known of each file below a directory: whoever looks
// at the same files is to see the same.
//
//	fsprobe show [-times] directory
func show(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("fsprobe show", flag.ExitOnError)
	withTimes := flags.Bool("times", false, "print the time of the last change of contents, too")
	flags.Parse(args) //nolint:errcheck // exits
	root := flags.Arg(0)
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		var what, when string
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what = try.Text([]byte(target))
		case unix.S_IFREG:
			if what, err = ends(path, st.Size); err != nil {
				return err
			}
			what = fmt.Sprintf("%d bytes, %s", st.Size, what)
		case unix.S_IFCHR, unix.S_IFBLK:
			what = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if *withTimes {
			when = fmt.Sprintf(" %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		_, err = fmt.Fprintf(out, "%q: %o %d:%d%s, %d links, %s%s\n", rel, st.Mode, st.Uid, st.Gid, when, st.Nlink, what, values(path))
		return err
	})
}

// ends is a file's contents, or of a large file its two ends.
func ends(path string, length int64) (string, error) {
	const most = 1 << 20
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	parts := []*io.SectionReader{io.NewSectionReader(f, 0, length)}
	if length > 2*most {
		parts = []*io.SectionReader{io.NewSectionReader(f, 0, most), io.NewSectionReader(f, length-most, most)}
	}
	var seen []string
	for _, part := range parts {
		data, err := io.ReadAll(part)
		if err != nil {
			return "", err
		}
		seen = append(seen, try.Digest(data))
	}
	return strings.Join(seen, "-"), nil
}

// values are a file's user.* attributes and its capabilities.
func values(path string) string {
	var all strings.Builder
	buf := make([]byte, 70000)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return ""
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if strings.HasPrefix(name, "user.") || name == "security.capability" {
			fmt.Fprintf(&all, ", %q = %s", name, owner.Attribute(path, name))
		}
	}
	return all.String()
}
