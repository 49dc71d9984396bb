package cpulist

import (
	"slices"
	"testing"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		list string
		want Set
		text string
		bad  bool
	}{
		{"", nil, "", false},
		{"0\n", Set{0}, "0", false},
		{"0-3,8", Set{0, 1, 2, 3, 8}, "0-3,8", false},
		{"8,0-1,1-2", Set{0, 1, 2, 8}, "0-2,8", false},
		{"5,7,9", Set{5, 7, 9}, "5,7,9", false},
		{"3-1", nil, "", true},
		{"-1", nil, "", true},
		{"1-", nil, "", true},
		{"a", nil, "", true},
		{"1,,2", nil, "", true},
		{"0-4294967295", nil, "", true}, // no set of that size is made
	} {
		got, err := Parse(tt.list)
		if (err != nil) != tt.bad || !slices.Equal(got, tt.want) || got.String() != tt.text {
			t.Errorf("%q: got %v (%s), %v", tt.list, []int(got), got, err)
		}
	}
}

func TestSets(t *testing.T) {
	a, b := Of(3, 1, 2, 3), Of(3, 4)
	if got := a.And(b); !slices.Equal(got, Set{3}) {
		t.Errorf("and: %v", got)
	}
	if got := a.Union(b); got.String() != "1-4" {
		t.Errorf("union: %v", got)
	}
	if !slices.Equal(a, Set{1, 2, 3}) || !slices.Equal(b, Set{3, 4}) {
		t.Errorf("an operation has changed its operands: %v, %v", a, b)
	}
}
