package modules

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Newest returns the highest kernel release below dir, usually /lib/modules,
// that holds flavour, such as "cloud", and has a module index. With none it is
// errdefs.ErrNotFound.
func Newest(dir, flavour string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("list kernel releases: %w", err)
	}
	var releases []string
	for _, e := range entries {
		_, err := os.Stat(filepath.Join(dir, e.Name(), "modules.dep"))
		if err == nil && strings.Contains(e.Name(), flavour) {
			releases = append(releases, e.Name())
		}
	}
	if len(releases) == 0 {
		return "", fmt.Errorf("no %s kernel in %s: install one (Debian: linux-image-cloud-amd64): %w", flavour, dir, errdefs.ErrNotFound)
	}
	return slices.MaxFunc(releases, compareReleases), nil
}

// compareReleases orders releases by their numbers, and by text between them:
// 6.1.0-9 comes before 6.1.0-10.
func compareReleases(a, b string) int {
	for a != "" && b != "" {
		var x, y string
		x, a = leadingRun(a)
		y, b = leadingRun(b)
		if isDigit(x[0]) && isDigit(y[0]) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
	}
	return len(a) - len(b)
}

// leadingRun splits s, which is not empty, after its leading digits or
// non-digits.
func leadingRun(s string) (run, rest string) {
	digits := isDigit(s[0])
	end := strings.IndexFunc(s, func(r rune) bool { return (r >= '0' && r <= '9') != digits })
	if end < 0 {
		return s, ""
	}
	return s[:end], s[end:]
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
