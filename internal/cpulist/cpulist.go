// Package cpulist is a set of the host's CPUs or NUMA nodes, as the kernel writes it:
// "0-3,8".
package cpulist

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxCPU is above what Linux can be built for.
const maxCPU = 1 << 16

// A Set is in order, and each number is in it once.
type Set []int

// Parse reads a list. An empty one is of no CPU.
func Parse(list string) (Set, error) {
	var set Set
	if list = strings.TrimSpace(list); list == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%q in the list %q is no number below %d", part, list, maxCPU)
		}
		to, err := strconv.ParseUint(last, 10, 16)
		if err != nil || to < from {
			return nil, fmt.Errorf("%q in the list %q is no range", part, list)
		}
		for n := from; n <= to; n++ {
			set = append(set, int(n))
		}
	}
	return Of(set...), nil
}

// Of is the set of some numbers.
func Of(numbers ...int) Set {
	set := slices.Clone(numbers)
	slices.Sort(set)
	return slices.Compact(set)
}

// Union is what is in one of the sets.
func (s Set) Union(o Set) Set { return Of(append(slices.Clone(s), o...)...) }

// And is what is in both sets.
func (s Set) And(o Set) Set {
	return slices.DeleteFunc(slices.Clone(s), func(n int) bool { return !slices.Contains(o, n) })
}

// String is the list that Parse reads.
func (s Set) String() string {
	var b strings.Builder
	for i := 0; i < len(s); {
		j := i
		for j+1 < len(s) && s[j+1] == s[j]+1 {
			j++
		}
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Itoa(s[i]))
		if j > i {
			b.WriteByte('-')
			b.WriteString(strconv.Itoa(s[j]))
		}
		i = j + 1
	}
	return b.String()
}

// MarshalText is String, for JSON.
func (s Set) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
