// Command torture has processes race for files, and finds out whether a file system
// keeps its promises to each:
//
//	torture race [-group word] [-writers n] [-operations n] directory
//	torture verify directory
//	torture many n directory
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/try"
)

// The names in a directory under torture, beside each writer's own directory.
const (
	slots    = "slots" // directory of names that all writers fight for
	logFile  = "log"   // to which all append, and which is there before
	counter  = "counter-"
	manifest = "manifest-" // what a writer says it has left
)

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) > 1 && args[0] == "race":
		err = race(args[1:])
	case len(args) == 5 && args[0] == "write":
		err = write(args[1:])
	case len(args) == 2 && args[0] == "verify":
		err = verify(args[1])
	case len(args) == 3 && args[0] == "many":
		err = many(args[1:])
	default:
		err = errors.New("see the comment of the command for its arguments")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "torture: %v\n", err)
		os.Exit(1)
	}
}

// race has writers race in one directory, each a process of its own:
//
//	torture race [-group word] [-writers n] [-operations n] directory
//
// The directory has an empty file "log". Those of one group count under a lock. Each checks what it reads on the way, and
// says at the end what it leaves; `torture verify directory` holds it to that, also
// on another machine.
func race(args []string) error {
	flags := flag.NewFlagSet("torture race", flag.ExitOnError)
	group := flags.String("group", "one", "`word` that tells these writers from others in the directory")
	writers := flags.Int("writers", 10, "how many")
	operations := flags.String("operations", "200", "how many each does")
	flags.Parse(args) //nolint:errcheck // exits
	dir := flags.Arg(0)
	if err := os.MkdirAll(filepath.Join(dir, slots), 0o777); err != nil {
		return err
	}
	var all []*exec.Cmd
	for i := range *writers {
		cmd := exec.Command("/proc/self/exe", "write", *group, strconv.Itoa(i), *operations, dir)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		all = append(all, cmd)
	}
	var errs []error
	for _, cmd := range all {
		errs = append(errs, cmd.Wait())
	}
	return errors.Join(errs...)
}

// A writer works on files of its own, of which it knows what is in them, and on
// those of all, of which it knows what may be.
type writer struct {
	group, name string
	root        string
	random      *rand.Rand
	files       map[string]*inode
	made        int
	Left        map[string]leftover
	Counted     int
	Logged      int
}

// An inode is what its names, of one or several, share.
type inode struct {
	data  []byte
	links int
}

// A leftover is what a file has to be in the end.
type leftover struct {
	Size, Links int
	Digest      string
}

func write(args []string) error {
	operations, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	name := args[0] + "-" + args[1]
	seed := sha256.Sum256([]byte(name))
	w := &writer{group: args[0], name: name, root: args[3], random: rand.New(rand.NewChaCha8(seed)), files: map[string]*inode{}}
	if err := os.Mkdir(w.own(""), 0o755); err != nil {
		return err
	}
	kinds := []func() error{
		w.create, w.create, w.overwrite, w.append, w.truncate, w.mapped, w.rename, w.rename, w.link, w.unlink, w.read, w.read, w.list,
		w.publish, w.publish, w.look, w.look, w.steal, w.count, w.log,
	}
	for i := range operations {
		if err := kinds[w.random.IntN(len(kinds))](); err != nil {
			return fmt.Errorf("writer %s, operation %d: %w", w.name, i, err)
		}
	}
	w.Left = map[string]leftover{}
	for name, f := range w.files {
		w.Left[name] = leftover{len(f.data), f.links, try.Digest(f.data)}
	}
	data, err := json.Marshal(w)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(w.root, manifest+w.name), data, 0o644)
}

func (w *writer) own(name string) string { return filepath.Join(w.root, w.name, name) }

// some is one of its own files; none where there is none.
func (w *writer) some() (name string, f *inode) {
	names := slices.Sorted(maps.Keys(w.files))
	if len(names) == 0 {
		return "", nil
	}
	name = names[w.random.IntN(len(names))]
	return name, w.files[name]
}

func (w *writer) bytes(most int) []byte {
	data := make([]byte, w.random.IntN(most))
	for i := range data {
		data[i] = byte(w.random.Uint32())
	}
	return data
}

func (w *writer) create() error {
	w.made++
	name, f := fmt.Sprintf("file-%d", w.made), &inode{data: w.bytes(20000), links: 1}
	w.files[name] = f
	return os.WriteFile(w.own(name), f.data, 0o644)
}

// change opens a file of its own to write, if there is one that is not empty.
func (w *writer) change(flags int, do func(file *os.File, f *inode) error) error {
	name, f := w.some()
	if f == nil || len(f.data) == 0 {
		return nil
	}
	file, err := os.OpenFile(w.own(name), os.O_RDWR|flags, 0)
	if err != nil {
		return err
	}
	return errors.Join(do(file, f), file.Close())
}

func (w *writer) overwrite() error {
	return w.change(0, func(file *os.File, f *inode) error {
		at, data := w.random.IntN(len(f.data)), w.bytes(5000)
		f.data = append(f.data[:at:at], slices.Concat(data, f.data[min(at+len(data), len(f.data)):])...)
		_, err := file.WriteAt(data, int64(at))
		return err
	})
}

func (w *writer) append() error {
	return w.change(os.O_APPEND, func(file *os.File, f *inode) error {
		data := w.bytes(3000)
		f.data = append(f.data, data...)
		_, err := file.Write(data)
		return err
	})
}

func (w *writer) truncate() error {
	return w.change(0, func(file *os.File, f *inode) error {
		length := w.random.IntN(2 * len(f.data))
		f.data = append(f.data[:min(length, len(f.data))], make([]byte, max(0, length-len(f.data)))...)
		return file.Truncate(int64(length))
	})
}

func (w *writer) mapped() error {
	return w.change(0, func(file *os.File, f *inode) error {
		memory, err := unix.Mmap(int(file.Fd()), 0, len(f.data), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		at, data := w.random.IntN(len(f.data)), w.bytes(5000)
		copy(f.data[at:], data)
		copy(memory[at:], data)
		same := bytes.Equal(memory, f.data)
		if err := unix.Munmap(memory); err != nil {
			return err
		}
		if !same {
			return fmt.Errorf("%s in memory is not what was written", file.Name())
		}
		return nil
	})
}

// rename gives a file a new name, or that of another one.
func (w *writer) rename() error {
	from, f := w.some()
	if f == nil {
		return nil
	}
	w.made++
	to := fmt.Sprintf("renamed-%d", w.made)
	if w.random.IntN(2) == 0 {
		to, _ = w.some()
	}
	if other := w.files[to]; other != f {
		if other != nil {
			other.links--
		}
		delete(w.files, from)
		w.files[to] = f
	} // names of one file both stay
	return os.Rename(w.own(from), w.own(to))
}

func (w *writer) link() error {
	from, f := w.some()
	if f == nil {
		return nil
	}
	w.made++
	to := fmt.Sprintf("link-%d", w.made)
	f.links++
	w.files[to] = f
	return os.Link(w.own(from), w.own(to))
}

func (w *writer) unlink() error {
	name, f := w.some()
	if f == nil {
		return nil
	}
	f.links--
	delete(w.files, name)
	return os.Remove(w.own(name))
}

func (w *writer) read() error {
	name, f := w.some()
	if f == nil {
		return nil
	}
	data, err := os.ReadFile(w.own(name))
	if err == nil && !bytes.Equal(data, f.data) {
		err = fmt.Errorf("%s has %s, want %s", name, try.Text(data), try.Text(f.data))
	}
	return err
}

func (w *writer) list() error {
	entries, err := os.ReadDir(w.own(""))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := slices.Sorted(maps.Keys(w.files)); err == nil && !slices.Equal(names, want) {
		err = fmt.Errorf("its directory has %q, want %q", names, want)
	}
	return err
}

func (w *writer) slot() string {
	return filepath.Join(w.root, slots, fmt.Sprint("slot-", w.random.IntN(12)))
}

// publish puts a record, which ends in its own checksum, in the place of another.
func (w *writer) publish() error {
	data := w.bytes(30000)
	sum := sha256.Sum256(data)
	path := w.own("") + ".new"
	if err := os.WriteFile(path, append(data, sum[:]...), 0o644); err != nil {
		return err
	}
	return os.Rename(path, w.slot())
}

// look reads a record, if there is one.
func (w *writer) look() error { return checkRecord(w.slot()) }

// steal takes a record away, if there is one.
func (w *writer) steal() error {
	path := w.own("") + ".stolen"
	// EIO is what virtiofsd in C calls a name that is gone, and that this guest
	// remembers: another mount of the same directory, or the host, has taken it.
	if err := os.Rename(w.slot(), path); errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EIO) {
		return nil
	} else if err != nil {
		return err
	}
	return errors.Join(checkRecord(path), os.Remove(path))
}

func checkRecord(path string) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	at := max(0, len(data)-sha256.Size)
	if sum := sha256.Sum256(data[:at]); !bytes.Equal(sum[:], data[at:]) {
		return fmt.Errorf("%s: a record of %d bytes is broken", path, len(data))
	}
	return nil
}

// count adds one to the number in the group's file, under a lock.
func (w *writer) count() error {
	f, err := os.OpenFile(filepath.Join(w.root, counter+w.group), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	buf := make([]byte, 20)
	n, _ := f.ReadAt(buf, 0) // nothing in a new one
	w.Counted++
	_, err = f.WriteAt(fmt.Appendf(nil, "%010d", number(string(buf[:n]))+1), 0)
	return err
}

func (w *writer) log() error {
	f, err := os.OpenFile(filepath.Join(w.root, logFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%s %d\n", w.name, w.Logged)
	w.Logged++
	return errors.Join(err, f.Close())
}

// many makes small files, a thousand to a directory, looks at each again, prints how
// many there are, and removes them:
//
//	torture many n directory
func many(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	dir := args[1]
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("%03d", i/1000), fmt.Sprintf("file-%06d", i))
		if i%1000 == 0 {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(path, []byte(strconv.Itoa(i)), 0o644); err != nil {
			return err
		}
	}
	found := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() != int64(len(strconv.Itoa(found))) {
			err = fmt.Errorf("%s has %d bytes", path, info.Size())
		}
		found++
		return err
	})
	fmt.Printf("%d files\n", found)
	return errors.Join(err, os.RemoveAll(dir))
}
