package hostcheck

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// MinQEMU is the oldest QEMU that Husk runs on.
const MinQEMU = "7.2"

var qemuBanner = regexp.MustCompile(`^QEMU emulator version (\d+)\.(\d+)(\.\d+)?`)

// QEMUVersion asks the QEMU at path for its version, such as "7.2.22". A QEMU
// that is missing, does not run or is older than MinQEMU is an error.
func QEMUVersion(ctx context.Context, path string) (string, error) {
	const remedy = "install qemu-system-x86 " + MinQEMU + " or newer, or set hypervisor.path"
	banner, err := AskVersion(ctx, path)
	if err != nil {
		return "", fmt.Errorf("qemu %q: %w; %s", path, err, remedy)
	}
	m := qemuBanner.FindStringSubmatch(banner)
	if m == nil {
		return "", fmt.Errorf("qemu %q: is no QEMU, its version reads %.200q; %s", path, banner, remedy)
	}
	version := m[1] + "." + m[2] + m[3]
	major, errMajor := strconv.Atoi(m[1])
	minor, errMinor := strconv.Atoi(m[2])
	if errMajor != nil || errMinor != nil || major < 7 || major == 7 && minor < 2 {
		return "", fmt.Errorf("qemu %q: version %s is not supported; %s", path, version, remedy)
	}
	return version, nil
}

// AskVersion runs the program at path, without an environment, and returns the
// first line that it answers to --version. What it says of a failure is quoted in
// the error, which does not name the program.
func AskVersion(ctx context.Context, path string) (string, error) {
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = []string{}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("wait for --version: %w", context.Cause(ctx))
	}
	if err != nil {
		said, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
		if said != "" {
			return "", fmt.Errorf("%w: %.200q", execCause(err), said)
		}
		return "", execCause(err)
	}
	banner, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return banner, nil
}

// execCause strips the program's name, which the caller names itself.
func execCause(err error) error {
	var ee *exec.Error
	if errors.As(err, &ee) {
		return cause(ee.Err)
	}
	return cause(err)
}
