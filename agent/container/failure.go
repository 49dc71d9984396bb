package container

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// explain turns the failure of a command of the OCI runtime into one line: the
// last error of its log, with the remedy where a user has one. process is the
// one that was to be made, or nil.
func explain(process *specs.Process, log string, err error) error {
	b, rerr := os.ReadFile(log)
	if rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		return errors.Join(err, rerr)
	}
	message := lastError(b)
	if message == "" {
		return errors.New(oneLine(err.Error()))
	}
	return classify(process, message)
}

// lastError returns the last message of level error in a log of JSON lines.
func lastError(log []byte) string {
	var last string
	for line := range bytes.Lines(log) {
		var entry struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
		}
		if json.Unmarshal(line, &entry) == nil && entry.Level == "error" && entry.Msg != "" {
			last = entry.Msg
		}
	}
	return oneLine(last)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// mountOn is how crun names a mount. What is mounted is a path of the guest, which
// tells a user nothing.
var mountOn = regexp.MustCompile("^mount `.*` to `/?(.*)`$")

// classify gives a message of crun (1.8 and later) a class and a remedy.
func classify(process *specs.Process, message string) error {
	command, cwd := "", ""
	if process != nil {
		cwd = process.Cwd
		if len(process.Args) > 0 {
			command = process.Args[0]
		}
	}
	what, cause, _ := cutLast(message, ": ")
	cause = strings.ToLower(cause)
	mount := mountOn.FindStringSubmatch(what)
	switch {
	case strings.HasPrefix(message, "executable file ") && strings.Contains(message, " not found in $PATH"):
		if strings.Contains(command, "/") {
			return fmt.Errorf("%q: no such file: check the command, and the image for it: %w", command, errdefs.ErrNotFound)
		}
		return fmt.Errorf("%q: executable file not found in $PATH: check the command, and PATH of the image: %w", command, errdefs.ErrNotFound)
	case strings.HasPrefix(message, "open executable: "):
		return fmt.Errorf("%q: not executable (%s): check the command, and the mode of its file: %w", command, cause, errdefs.ErrPermissionDenied)
	case strings.HasPrefix(message, "chdir "):
		return fmt.Errorf("working directory %q: %s: check cwd: %w", cwd, cause, errdefs.ErrInvalidArgument)
	case mount != nil && cause == "not a directory":
		return fmt.Errorf("mount on %q: %s: a directory can be mounted on a directory, anything else on a file: %w", "/"+mount[1], cause, errdefs.ErrInvalidArgument)
	case mount != nil:
		return fmt.Errorf("mount on %q: %s: check the options of the mount: %w", "/"+mount[1], cause, errdefs.ErrInvalidArgument)
	case strings.HasSuffix(message, "does not exist"), strings.HasPrefix(message, "error opening file ") && strings.Contains(message, "/status`"):
		return fmt.Errorf("%s: %w", message, errdefs.ErrNotFound)
	}
	return errors.New(message)
}

// cutLast slices s around the last instance of sep.
func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return "", s, false
}
