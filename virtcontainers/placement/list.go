package placement

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// mostCPUs is the most that Linux can be built for (CONFIG_NR_CPUS).
const mostCPUs = 8192

// ParseList reads a list such as "0-2,7" (cpuset(7), "List format") into ascending
// numbers, each once. An empty one has none. The error is InvalidArgument.
func ParseList(s string) ([]int, error) {
	var all []int
	s = strings.TrimSpace(s)
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, ranged := strings.Cut(part, "-")
		a, err := strconv.ParseUint(first, 10, 16)
		b := a
		if err == nil && ranged {
			b, err = strconv.ParseUint(last, 10, 16)
		}
		if err != nil || b < a || b >= mostCPUs {
			return nil, fmt.Errorf("%q in the list %q is no number or range from 0 to %d: %w", part, s, mostCPUs-1, errdefs.ErrInvalidArgument)
		}
		for n := a; n <= b; n++ {
			all = append(all, int(n))
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// FormatList is the list of ascending numbers.
func FormatList(all []int) string {
	var parts []string
	for i := 0; i < len(all); {
		j := i
		for j+1 < len(all) && all[j+1] == all[j]+1 {
			j++
		}
		part := strconv.Itoa(all[i])
		if j > i {
			part += "-" + strconv.Itoa(all[j])
		}
		parts, i = append(parts, part), j+1
	}
	return strings.Join(parts, ",")
}
