package process

import (
	"testing"
	"time"
)

func TestOOMs(t *testing.T) {
	began := time.Unix(1000, 0)
	for name, tt := range map[string]struct {
		do   func(o *OOMs) []bool
		want []bool
	}{
		"told once": {func(o *OOMs) []bool { return []bool{o.Add(began), o.Take(), o.Take()} }, []bool{true, true, false}},
		"a burst is told once": {func(o *OOMs) []bool {
			return []bool{o.Add(began), o.Add(began.Add(oomPause - 1)), o.Take(), o.Add(began.Add(oomPause)), o.Take()}
		}, []bool{true, false, true, true, true}},
		"the exit was quicker": {func(o *OOMs) []bool { o.End(1); return []bool{o.Take(), o.Add(began), o.Take()} }, []bool{true, false, false}},
		"the exit has no more to tell": {func(o *OOMs) []bool {
			told := []bool{o.Add(began), o.Take()}
			o.End(1)
			return append(told, o.Take())
		}, []bool{true, true, false}},
		"an exit without": {func(o *OOMs) []bool { o.End(0); return []bool{o.Take()} }, []bool{false}},
	} {
		got := tt.do(&OOMs{})
		for i, want := range tt.want {
			if got[i] != want {
				t.Errorf("%s: got %v, want %v", name, got, tt.want)
				break
			}
		}
	}
}
