package cp

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	state "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/husk-containers/husk/internal/archive"
	"github.com/husk-containers/husk/internal/statedir"
	"github.com/husk-containers/husk/shim/transfer"
)

const patience = time.Minute

// rooted are the files of a container whose root is a directory of the host.
type rooted string

func (r rooted) CopyIn(ctx context.Context, path string, in io.Reader) error {
	dir := filepath.Join(string(r), path)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
	}
	cmd := exec.CommandContext(ctx, "tar", "-x", "-C", dir)
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tar: %w: %s", err, out)
	}
	return nil
}

func (r rooted) CopyOut(_ context.Context, path string, out io.Writer) error {
	err := archive.Write(out, filepath.Join(string(r), path), filepath.Base(path))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
	}
	return err
}

// shim serves a container of that id in the namespace "ns" below dir.
func shim(t *testing.T, dir, id string, status state.Status, files transfer.Files) {
	t.Helper()
	sandbox := statedir.Sandbox(dir, "ns", "pod-of-"+id)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	must(t, err, os.Mkdir(sandbox, 0o711), statedir.SetAddress(sandbox, l.Addr().String()))
	server, err := ttrpc.NewServer()
	must(t, err)
	server.Register("containerd.task.v3.Task", map[string]ttrpc.Method{
		"State": func(_ context.Context, unmarshal func(any) error) (any, error) {
			var r task.StateRequest
			if err := unmarshal(&r); err != nil {
				return nil, err
			}
			if r.ID != id {
				return nil, errgrpc.ToGRPC(fmt.Errorf("task %q: %w", r.ID, errdefs.ErrNotFound))
			}
			return &task.StateResponse{ID: id, Status: status}, nil
		},
	})
	service := transfer.New(func(string) (transfer.Files, error) { return files, nil })
	service.Register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		service.Close(ctx)
		if ctx.Err() != nil {
			t.Error("a transfer did not end")
		}
		server.Close() //nolint:errcheck // the test is over
		<-served
	})
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func options(dir string) Options {
	return Options{StateDir: dir, Namespace: "ns", Limits: archive.Limits{Entries: 1000, Bytes: 1 << 30}, Stdin: strings.NewReader(""), Stdout: io.Discard}
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// files lists the files and links below dir with what is in them.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		switch {
		case d.IsDir():
			name += "/"
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			must(t, err)
			name += " -> " + target
		default:
			body, err := os.ReadFile(path)
			must(t, err)
			name += "=" + string(body)
		}
		list = append(list, name)
		return nil
	}))
	return list
}

// The same names mean the same whichever side is the container's, but where noted.
func TestNames(t *testing.T) {
	source := func(dir string) {
		must(t,
			os.MkdirAll(dir+"/s/d/e", 0o755), os.WriteFile(dir+"/s/f", []byte("F"), 0o644), os.WriteFile(dir+"/s/d/g", []byte("G"), 0o644),
			os.Symlink("d", dir+"/s/l"), os.Symlink("f", dir+"/s/m"),
		)
	}
	destination := func(dir string) {
		must(t,
			os.MkdirAll(dir+"/t/d", 0o755), os.WriteFile(dir+"/t/d/old", []byte("O"), 0o644), os.WriteFile(dir+"/t/x", []byte("X"), 0o644),
			os.Symlink("d", dir+"/t/l"), os.Symlink("x", dir+"/t/k"),
		)
	}
	there := []string{"d/", "d/old=O", "k -> x", "l -> d", "x=X"}
	with := func(more ...string) []string {
		all := append(slices.Clone(there), more...)
		slices.Sort(all)
		return all
	}
	for _, tt := range []struct {
		from, to string
		want     []string // below t; nil: an error
		text     string   // of the error
	}{
		{"s/f", "t", with("f=F"), ""},
		{"s/f", "t/", with("f=F"), ""},
		{"s/f", "t/.", with("f=F"), ""},
		{"s/f", "t/new", with("new=F"), ""},
		{"s/f", "t/x", []string{"d/", "d/old=O", "k -> x", "l -> d", "x=F"}, ""},
		{"s/f", "t/k", []string{"d/", "d/old=O", "k -> x", "l -> d", "x=F"}, ""},
		{"s/f", "t/l", with("d/f=F"), ""},
		{"s/f", "t/new/", nil, "does not exist"},
		{"s/f", "t/none/new", nil, "none"},
		{"s/d", "t/none/new", nil, "none"},
		{"s/f", "t/x/", nil, "not a directory"},
		{"s/d", "t", with("d/e/", "d/g=G"), ""},
		{"s/d", "t/new", with("new/", "new/e/", "new/g=G"), ""},
		{"s/d", "t/new/", with("new/", "new/e/", "new/g=G"), ""},
		{"s/d/", "t/d", with("d/d/", "d/d/e/", "d/d/g=G"), ""},
		{"s/d/.", "t/d", with("d/e/", "d/g=G"), ""},
		{"s/d/.", "t/new", with("new/", "new/e/", "new/g=G"), ""},
		{"s/d", "t/x", nil, "directory"},
		{"s/l", "t/new", with("new -> d"), ""},
		{"s/l/.", "t/new", with("new/", "new/e/", "new/g=G"), ""},
		{"s/m", "t", with("m -> f"), ""},
		{"s/none", "t", nil, "none"},
	} {
		for _, in := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s to %s, in=%v", tt.from, tt.to, in), func(t *testing.T) {
				dir, host, guest := t.TempDir(), t.TempDir(), t.TempDir()
				shim(t, dir, "c", state.Status_RUNNING, rooted(guest))
				var err error
				at := guest
				if in {
					source(host)
					destination(guest)
					err = Copy(within(t), options(dir), host+"/"+tt.from, "c:"+tt.to)
				} else {
					at = host
					source(guest)
					destination(host)
					err = Copy(within(t), options(dir), "c:/"+tt.from, host+"/"+tt.to)
				}
				want := tt.want
				if want == nil {
					want = there
					if err == nil || !strings.Contains(err.Error(), tt.text) {
						t.Errorf("got %v, want %q", err, tt.text)
					}
				} else if err != nil {
					t.Fatal(err)
				}
				got := files(t, at+"/t")
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		}
	}
}

func TestStandardStreams(t *testing.T) {
	dir, guest := t.TempDir(), t.TempDir()
	shim(t, dir, "c", state.Status_RUNNING, rooted(guest))
	must(t, os.Mkdir(guest+"/d", 0o755), os.WriteFile(guest+"/d/f", []byte("F"), 0o644))
	o := options(dir)
	var out bytes.Buffer
	o.Stdout = &out
	must(t, Copy(within(t), o, "c:/d", "-"))
	o.Stdin = bytes.NewReader(out.Bytes())
	must(t, os.Mkdir(guest+"/again", 0o755), Copy(within(t), o, "-", "c:/again"))
	want := []string{"again/", "again/d/", "again/d/f=F", "d/", "d/f=F"}
	if got := files(t, guest); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	o.Stdin = bytes.NewReader(out.Bytes()[:512])
	if err := Copy(within(t), o, "-", "c:/again"); err == nil {
		t.Error("a part of a tar was taken for whole")
	}
}

// hostile answers with its own tar, whatever was asked for.
type hostile struct {
	rooted
	tar []byte
	end error
}

func (h hostile) CopyOut(_ context.Context, _ string, out io.Writer) error {
	if _, err := out.Write(h.tar); err != nil {
		return err
	}
	return h.end
}

type endless struct{ rooted }

func (endless) CopyOut(_ context.Context, _ string, out io.Writer) error {
	tw := tar.NewWriter(out)
	err := tw.WriteHeader(&tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755})
	for i := 0; err == nil; i++ {
		err = tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("d/%d", i), Typeflag: tar.TypeSymlink, Linkname: "x"})
	}
	return err
}

// The copy into ~ of a directory that is a link into another of its directories, for one,
// is refused; more of these are archive's tests.
func TestHostileGuests(t *testing.T) {
	archived := func(headers ...tar.Header) []byte {
		var buf bytes.Buffer
		tw := tar.NewWriter(&buf)
		for _, h := range headers {
			must(t, tw.WriteHeader(&h))
		}
		must(t, tw.Close())
		return buf.Bytes()
	}
	one := archived(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755})
	for _, tt := range []struct {
		name  string
		files transfer.Files
		text  string
	}{
		{"a link, and through it", hostile{tar: archived(
			tar.Header{Name: "d", Typeflag: tar.TypeSymlink, Linkname: ".ssh"},
			tar.Header{Name: "d/authorized_keys", Typeflag: tar.TypeReg, Mode: 0o600})}, "refused"},
		{"a device", hostile{tar: archived(tar.Header{Name: "d", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1})}, "character device"},
		{"no tar", hostile{tar: bytes.Repeat([]byte("x"), 4096)}, "invalid tar header"},
		{"an error after the tar", hostile{tar: one, end: fmt.Errorf("disk: %w", errdefs.ErrDataLoss)}, "disk: "},
		{"more after the tar than pads it", hostile{tar: append(slices.Clone(one), make([]byte, 4<<20)...)}, "does not end"},
		{"entries without end", endless{}, "-max-entries and -max-bytes allow more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, home := t.TempDir(), t.TempDir()
			must(t, os.Mkdir(home+"/.ssh", 0o700))
			shim(t, dir, "c", state.Status_RUNNING, tt.files)
			err := Copy(within(t), options(dir), "c:/d", home)
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
			if got := files(t, home+"/.ssh"); len(got) > 0 {
				t.Errorf("in .ssh there is %q", got)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	shim(t, dir, "c", state.Status_RUNNING, rooted(t.TempDir()))
	shim(t, dir, "ended", state.Status_STOPPED, rooted(t.TempDir()))
	dead := statedir.Sandbox(dir, "ns", "dead")
	must(t, os.Mkdir(dead, 0o711), statedir.SetAddress(dead, dir+"/nobody"))
	for _, tt := range []struct {
		from, to string
		is       func(error) bool
		text     string
	}{
		{"a", "b", errdefs.IsInvalidArgument, `neither "a" nor "b" is CONTAINER:PATH`},
		{"./c:x", "/y:z", errdefs.IsInvalidArgument, "neither"},
		{"c:/a", "c:/b", errdefs.IsInvalidArgument, "both are in containers"},
		{"c:", "b", errdefs.IsInvalidArgument, `"c:" is not CONTAINER:PATH`},
		{":/x", "b", errdefs.IsInvalidArgument, `":/x" is not CONTAINER:PATH`},
		{"", "c:/b", errdefs.IsInvalidArgument, "an empty path"},
		{"other:/a", "b", errdefs.IsNotFound, `no container "other" in namespace "ns", of 3 sandboxes`},
		{"other:/a", "b", errdefs.IsNotFound, "sandbox dead does not answer: dial unix"},
		{"ended:/a", "b", errdefs.IsFailedPrecondition, `container "ended" has ended`},
		{"c:/none", dir, errdefs.IsNotFound, "/none"},
		{"c:/none/.", dir, errdefs.IsNotFound, "/none does not exist in the container"},
		{"cp.go", "c:/none/f", errdefs.IsNotFound, "directory /none does not exist in the container: make it first"},
		{dir + "/none", "c:/", func(err error) bool { return errors.Is(err, fs.ErrNotExist) }, "none"},
	} {
		t.Run(tt.from+" to "+tt.to, func(t *testing.T) {
			if err := Copy(within(t), options(dir), tt.from, tt.to); !tt.is(err) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
		})
	}
}

// hang takes a tar's first bytes and then nothing, until it is told to end.
type hang struct {
	rooted
	began chan struct{}
	ended chan error
}

func (h hang) CopyIn(ctx context.Context, _ string, _ io.Reader) error {
	close(h.began)
	<-ctx.Done()
	h.ended <- context.Cause(ctx)
	return ctx.Err()
}

// One who gives up leaves nothing behind in the shim.
func TestCancel(t *testing.T) {
	dir, from := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(from+"/f", make([]byte, 1<<20), 0o644))
	h := hang{rooted(t.TempDir()), make(chan struct{}), make(chan error, 1)}
	shim(t, dir, "c", state.Status_RUNNING, h)
	ctx, cancel := context.WithCancelCause(within(t))
	interrupted := errors.New("interrupted")
	go func() {
		<-h.began
		cancel(interrupted)
	}()
	if err := Copy(ctx, options(dir), from+"/f", "c:/"); !errors.Is(err, interrupted) {
		t.Errorf("got %v", err)
	}
	select {
	case <-h.ended:
	case <-time.After(patience):
		t.Error("the shim's side goes on")
	}
}
