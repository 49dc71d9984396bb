package hostcheck

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
)

// A newc entry is a header of hexadecimal fields, the name, and the data; name
// and data are padded to 4 bytes: Documentation/driver-api/early-userspace/buffer-format.rst.
const (
	newcMagic      = "070701"
	newcCRCMagic   = "070702"
	newcHeaderSize = 110
	newcOffSize    = 54 // eight hexadecimal digits: bytes of data
	newcOffName    = 94 // eight hexadecimal digits: bytes of name, with its NUL
	newcTrailer    = "TRAILER!!!\x00"
	newcMaxName    = 4096
)

// Magic numbers of the compressions a guest kernel may unpack by itself.
var compressions = [...]struct{ magic, name string }{
	{"\x1f\x8b", "gzip"},
	{"\x28\xb5\x2f\xfd", "zstd"},
	{"\xfd7zXZ\x00", "xz"},
	{"\x02\x21\x4c\x18", "lz4"},
}

// CheckInitrd returns nil where path is a whole initial RAM disk: a plain newc
// archive with its end in place, or a compressed one, of which it knows the
// magic number only. It reads headers, not contents.
func CheckInitrd(path string) error {
	f, size, err := openImage(path)
	if err == nil {
		defer f.Close()
		err = checkInitrd(f, size)
	}
	if err != nil {
		return fmt.Errorf("guest image %q: %w; install Husk again, or set guest.initrd", path, err)
	}
	return nil
}

func checkInitrd(f *os.File, size int64) error {
	start := make([]byte, len(newcMagic))
	if _, err := f.ReadAt(start, 0); err != nil && !errors.Is(err, io.EOF) {
		return cause(err)
	}
	for _, c := range compressions {
		if bytes.HasPrefix(start, []byte(c.magic)) {
			return nil
		}
	}
	if string(start) != newcMagic && string(start) != newcCRCMagic {
		return errors.New("is no initial RAM disk: neither a newc archive nor a compressed one")
	}
	return walkNewc(f, size)
}

// walkNewc goes from header to header until the archive's end.
func walkNewc(f *os.File, size int64) error {
	h := make([]byte, newcHeaderSize)
	for off := int64(0); ; {
		if _, err := f.ReadAt(h, off); err != nil {
			return truncated(err, size)
		}
		data, err1 := strconv.ParseUint(string(h[newcOffSize:newcOffSize+8]), 16, 32)
		name, err2 := strconv.ParseUint(string(h[newcOffName:newcOffName+8]), 16, 32)
		magic := string(h[:len(newcMagic)])
		if magic != newcMagic && magic != newcCRCMagic || err1 != nil || err2 != nil || name > newcMaxName {
			return fmt.Errorf("is damaged: no archive header at byte %d", off)
		}
		if name == uint64(len(newcTrailer)) {
			b := make([]byte, name)
			if _, err := f.ReadAt(b, off+newcHeaderSize); err != nil {
				return truncated(err, size)
			}
			if string(b) == newcTrailer {
				return nil
			}
		}
		off = align4(off+newcHeaderSize+int64(name)) + int64(data)
		off = align4(off)
	}
}

func align4(n int64) int64 { return (n + 3) &^ 3 }

func truncated(err error, size int64) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("is truncated: %d bytes and no end of archive", size)
	}
	return cause(err)
}
