package sample

import (
	"testing"
	"time"
)

func TestQuantileIsTheNearestRank(t *testing.T) {
	list := []int{9, 1, 8, 2, 7, 3, 6, 4, 5}
	for q, want := range map[float64]int{0: 1, 0.5: 5, 0.9: 8, 0.99: 9, 1: 9} {
		if got := Quantile(list, q); got != want {
			t.Errorf("quantile %v of 1 to 9: %d, want %d", q, got, want)
		}
	}
	if list[0] != 9 {
		t.Error("the list was sorted in place")
	}
	if got := Quantile([]int{3}, 0.99); got != 3 {
		t.Errorf("quantile of one: %d", got)
	}
}

func TestCells(t *testing.T) {
	times := []time.Duration{3 * time.Millisecond, 1500 * time.Microsecond, 20 * time.Millisecond}
	for got, want := range map[string]string{
		Milliseconds(times):                                "3 ms (1 to 20)",
		Microseconds(times):                                "3000 µs (1500 to 20000)",
		Rates([]float64{12.4, 7, 99.6}):                    "12 MiB/s (7 to 100)",
		Frequencies([]float64{1500.4, 2}):                  "1500 /s (2 to 1500)",
		Factors([]float64{0.456, 1, 12.34, 123.4, 0.0123}): "1.0 × (0.01 to 123)",
		Sizes([]int{1024, 1536, 512}):                      "1.0 (0.5 to 1.5)",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
