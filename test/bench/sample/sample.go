// Package sample writes what was measured several times as one cell of a table.
package sample

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// Quantile is the nearest rank of q, from 0 to 1, in a list that is not empty.
func Quantile[T cmp.Ordered](list []T, q float64) T {
	return slices.Sorted(slices.Values(list))[int(q*float64(len(list)-1)+0.5)]
}

// Milliseconds is the median of a list that is not empty, with its least and most.
func Milliseconds(list []time.Duration) string {
	return spread(list, "ms", func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) })
}

// Microseconds is Milliseconds for what is short.
func Microseconds(list []time.Duration) string {
	return spread(list, "µs", func(d time.Duration) string { return strconv.FormatInt(d.Microseconds(), 10) })
}

// Rates is the same for numbers of MiB/s.
func Rates(list []float64) string {
	return spread(list, "MiB/s", func(r float64) string { return strconv.FormatFloat(r, 'f', 0, 64) })
}

// Frequencies is the same for numbers of operations per second.
func Frequencies(list []float64) string {
	return spread(list, "/s", func(f float64) string { return strconv.FormatFloat(f, 'f', 0, 64) })
}

// Factors is the same for what is so many times another.
func Factors(list []float64) string {
	return spread(list, "×", func(f float64) string {
		switch {
		case f < 1:
			return strconv.FormatFloat(f, 'f', 2, 64)
		case f < 10:
			return strconv.FormatFloat(f, 'f', 1, 64)
		}
		return strconv.FormatFloat(f, 'f', 0, 64)
	})
}

// Sizes is the same for numbers of KiB, written in MiB.
func Sizes(list []int) string {
	return spread(list, "", func(kib int) string { return strconv.FormatFloat(float64(kib)/1024, 'f', 1, 64) })
}

func spread[T cmp.Ordered](list []T, unit string, number func(T) string) string {
	if unit != "" {
		unit = " " + unit
	}
	return fmt.Sprintf("%s%s (%s to %s)", number(Quantile(list, 0.5)), unit, number(slices.Min(list)), number(slices.Max(list)))
}
