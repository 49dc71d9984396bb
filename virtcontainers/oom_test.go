package virtcontainers

import (
	"testing"
	"time"
)

func TestOOMs(t *testing.T) {
	began := time.Unix(1000, 0)
	for name, tt := range map[string]struct {
		do   func(o *ooms) []bool
		want []bool
	}{
		"told once": {func(o *ooms) []bool { return []bool{o.add(began), o.take(), o.take()} }, []bool{true, true, false}},
		"a burst is told once": {func(o *ooms) []bool {
			return []bool{o.add(began), o.add(began.Add(oomPause - 1)), o.take(), o.add(began.Add(oomPause)), o.take()}
		}, []bool{true, false, true, true, true}},
		"the exit was quicker": {func(o *ooms) []bool { o.end(1); return []bool{o.take(), o.add(began), o.take()} }, []bool{true, false, false}},
		"the exit has no more to tell": {func(o *ooms) []bool {
			told := []bool{o.add(began), o.take()}
			o.end(1)
			return append(told, o.take())
		}, []bool{true, true, false}},
		"an exit without": {func(o *ooms) []bool { o.end(0); return []bool{o.take()} }, []bool{false}},
	} {
		got := tt.do(&ooms{})
		for i, want := range tt.want {
			if got[i] != want {
				t.Errorf("%s: got %v, want %v", name, got, tt.want)
				break
			}
		}
	}
}
