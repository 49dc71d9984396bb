package container

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// The messages are those of crun 1.8.1.
func TestExplain(t *testing.T) {
	unknown := errors.New("")
	for _, tc := range []struct {
		name, command, message string
		class                  error // unknown: none
		want                   string
	}{
		{
			"not in PATH", "nosuch", "executable file `nosuch` not found in $PATH: No such file or directory",
			errdefs.ErrNotFound, `"nosuch": executable file not found in $PATH: check the command, and PATH of the image`,
		},
		{
			"no such file", "/bin/nosuch", "executable file `/bin/nosuch` not found in $PATH: No such file or directory",
			errdefs.ErrNotFound, `"/bin/nosuch": no such file: check the command, and the image for it`,
		},
		{
			"not executable", "/bin/x", "open executable: Permission denied",
			errdefs.ErrPermissionDenied, `"/bin/x": not executable (permission denied): check the command, and the mode of its file`,
		},
		{
			"a directory", "/bin", "open executable: Operation not permitted",
			errdefs.ErrPermissionDenied, `"/bin": not executable (operation not permitted)`,
		},
		{
			"cwd", "x", "chdir `/nosuch`: No such file or directory",
			errdefs.ErrInvalidArgument, `working directory "/cwd": no such file or directory: check cwd`,
		},
		{
			"unknown container", "", "error opening file `/run/husk/crun/c/status`: No such file or directory",
			errdefs.ErrNotFound, "status",
		},
		{
			"a file on a directory", "x", "mount `/run/husk/share/c/mnt/0` to `etc`: Not a directory",
			errdefs.ErrInvalidArgument, `mount on "/etc": not a directory: a directory can be mounted on a directory`,
		},
		{
			"option", "x", "mount `tmpfs` to `/mnt/it`s`: Invalid argument",
			errdefs.ErrInvalidArgument, "mount on \"/mnt/it`s\": invalid argument: check the options of the mount",
		},
		{"anything else", "", "seccomp: bad\n  action", unknown, "seccomp: bad action"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			line := `{"msg":"a warning","level":"warning"}` + "\n" +
				`{"msg":"an earlier error","level":"error"}` + "\n" +
				`{"msg":` + quote(tc.message) + `,"level":"error","time":"2026-11-22T11:01:55.712594Z"}` + "\nnot json\n"
			if err := os.WriteFile(log, []byte(line), 0o600); err != nil {
				t.Fatal(err)
			}
			process := &specs.Process{Cwd: "/cwd", Args: []string{tc.command}}
			err := explain(process, log, errors.New("exit status 1"))
			if !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %q, want %q", err, tc.want)
			}
			if tc.class != unknown && !errors.Is(err, tc.class) {
				t.Errorf("%v is not %v", err, tc.class)
			}
		})
	}
}

func quote(s string) string { return `"` + strings.ReplaceAll(s, "\n", `\n`) + `"` }

func TestExplainWithoutLog(t *testing.T) {
	err := explain(nil, filepath.Join(t.TempDir(), "none"), errors.New("exit status 127:\n cannot\n"))
	if err == nil || err.Error() != "exit status 127: cannot" {
		t.Fatalf("got %q", err)
	}
}

func FuzzLastError(f *testing.F) {
	f.Add([]byte(`{"msg":"x","level":"error"}` + "\n"))
	f.Fuzz(func(t *testing.T, log []byte) {
		if strings.ContainsAny(lastError(log), "\n\r") {
			t.Fatal("more than one line")
		}
	})
}
