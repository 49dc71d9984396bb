package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
)

// seed makes every run write the same.
const seed = 7

// small works on n files of 64 bytes in one directory.
func small(p *Phases, dir string, n int) error {
	content := make([]byte, 64)
	each := func(f func(name string) error) func() error {
		return func() error {
			for i := range n {
				if err := f(filepath.Join(dir, "file-"+strconv.Itoa(i))); err != nil {
					return err
				}
			}
			return nil
		}
	}
	if err := p.phase("create", each(func(name string) error { return create(name, content) })); err != nil {
		return err
	}
	if err := p.phase("stat", each(func(name string) error {
		info, err := os.Lstat(name)
		if err == nil && info.Size() != int64(len(content)) {
			err = fmt.Errorf("%s has %d bytes", name, info.Size())
		}
		return err
	})); err != nil {
		return err
	}
	return p.phase("unlink", each(os.Remove))
}

// create writes a file that is not there, by one write.
func create(name string, content []byte) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Close())
}

// A writer makes a tree, and remembers what the tree must hold when it is read.
type writer struct {
	random *rand.Rand
	buf    []byte
	files  int
	bytes  int64
}

func newWriter() *writer {
	w := &writer{random: rand.New(rand.NewPCG(seed, seed)), buf: make([]byte, 64<<10)}
	for i := range w.buf {
		w.buf[i] = byte(w.random.Uint32())
	}
	return w
}

// size is one of few large and many small ones, as source files have: half of them
// are below 2 KiB, and none reaches 64 KiB.
func (w *writer) size() int { return 128 << w.random.IntN(9) * (1 + w.random.IntN(2)) * 7 / 8 }

// write creates a file of so many bytes, in pieces as programs write them.
func (w *writer) write(name string, size int) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	for left := size; left > 0 && err == nil; left -= len(w.buf) {
		_, err = f.Write(w.buf[:min(left, len(w.buf))])
	}
	w.files++
	w.bytes += int64(size)
	return errors.Join(err, f.Close())
}

// read opens all of the tree, and proves that it is what was written.
func (w *writer) read(dir string) error {
	files, total := 0, int64(0)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		files++
		for {
			n, err := f.Read(w.buf)
			total += int64(n)
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	return errors.Join(err, w.check(files, total))
}

// list looks at all of the tree as `ls -lR` does.
func (w *writer) list(dir string) error {
	files, total := 0, int64(0)
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().IsRegular() {
			files++
			total += info.Size()
		}
		return err
	})
	return errors.Join(err, w.check(files, total))
}

func (w *writer) check(files int, total int64) error {
	if files != w.files || total != w.bytes {
		return fmt.Errorf("the tree has %d files of %d bytes in all, want %d of %d", files, total, w.files, w.bytes)
	}
	return nil
}

// packBytes is the size of a clone's pack.
const packBytes = 24 << 20

// clone writes one pack and its index, each renamed into place, and a working tree
// of n files, 20 in a directory.
func clone(p *Phases, dir string, n int) error {
	dir = filepath.Join(dir, "repository")
	w := newWriter()
	if err := p.phase("write", func() error {
		packs := filepath.Join(dir, ".git", "objects", "pack")
		if err := os.MkdirAll(packs, 0o755); err != nil {
			return err
		}
		for _, f := range []struct {
			suffix string
			size   int
		}{{".pack", packBytes}, {".idx", packBytes / 24}} {
			temporary := filepath.Join(packs, "tmp"+f.suffix)
			if err := w.write(temporary, f.size); err != nil {
				return err
			}
			if err := os.Rename(temporary, filepath.Join(packs, "pack-1"+f.suffix)); err != nil {
				return err
			}
		}
		for i := range n {
			below := filepath.Join(dir, fmt.Sprintf("module-%d", i/200), fmt.Sprintf("package-%d", i/20))
			if i%20 == 0 {
				if err := os.MkdirAll(below, 0o755); err != nil {
					return err
				}
			}
			if err := w.write(filepath.Join(below, fmt.Sprintf("source-%d.go", i)), w.size()); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := p.phase("read", func() error { return w.read(dir) }); err != nil {
		return err
	}
	return p.phase("remove", func() error { return os.RemoveAll(dir) })
}

// filesPerPackage is how many files one of install's packages has.
const filesPerPackage = 20

// install unpacks n packages of small files: each into a directory of its own
// beside the tree, from where it is renamed to its place, five levels deep and
// deeper; its mode bits are set, and a link to its program is made.
func install(p *Phases, dir string, n int) error {
	dir = filepath.Join(dir, "project")
	w := newWriter()
	if err := p.phase("write", func() error { return w.install(dir, n) }); err != nil {
		return err
	}
	if err := p.phase("list", func() error { return w.list(dir) }); err != nil {
		return err
	}
	return p.phase("remove", func() error { return os.RemoveAll(dir) })
}

func (w *writer) install(dir string, n int) error {
	modules, staging := filepath.Join(dir, "node_modules"), filepath.Join(dir, ".staging")
	bin := filepath.Join(modules, ".bin")
	for _, d := range []string{modules, staging, bin} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for i := range n {
		name := fmt.Sprintf("package-%d", i)
		temporary := filepath.Join(staging, name+"-4f1d")
		program := filepath.Join("dist", "lib", "internal", "cli.js")
		if err := w.unpack(temporary, program); err != nil {
			return err
		}
		// Each third is a dependency of the one before it, and lies in it.
		place := filepath.Join(modules, name)
		if i%3 == 2 {
			within := filepath.Join(modules, fmt.Sprintf("package-%d", i-1), "node_modules")
			if err := os.Mkdir(within, 0o755); err != nil {
				return err
			}
			place = filepath.Join(within, name)
		}
		if err := os.Rename(temporary, place); err != nil {
			return err
		}
		target, err := filepath.Rel(bin, filepath.Join(place, program))
		if err != nil {
			return err
		}
		if err := os.Symlink(target, filepath.Join(bin, name)); err != nil {
			return err
		}
	}
	return os.Remove(staging)
}

// unpack writes one package into a new directory.
func (w *writer) unpack(dir, program string) error {
	deep := filepath.Join(dir, filepath.Dir(program))
	if err := os.MkdirAll(deep, 0o755); err != nil {
		return err
	}
	for i := range filesPerPackage {
		name, mode := filepath.Join(dir, fmt.Sprintf("file-%d.js", i)), os.FileMode(0o644)
		switch {
		case i == 0:
			name, mode = filepath.Join(dir, program), 0o755
		case i%2 == 0:
			name = filepath.Join(deep, fmt.Sprintf("file-%d.js", i))
		}
		if err := w.write(name, 100+w.random.IntN(1900)); err != nil {
			return err
		}
		if err := os.Chmod(name, mode); err != nil {
			return err
		}
	}
	return nil
}
