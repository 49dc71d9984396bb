package placement

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

// host has CPUs 0 to 7 on node 0 and 8 to 15 on node 1.
func host() Host {
	h := Host{Nodes: map[int][]int{}}
	for cpu := range 16 {
		h.CPUs = append(h.CPUs, cpu)
		h.Nodes[cpu/8] = append(h.Nodes[cpu/8], cpu)
	}
	return h
}

func TestPlace(t *testing.T) {
	type c = Container
	for name, tt := range map[string]struct {
		vcpus      int
		pin        bool
		containers []Container
		cpus       string // of the host's for each vCPU, "*" for any, by spaces
		guest      string // of each container, "*" for all, by spaces, in the order given
		helpers    string
		nodes      string
	}{
		"nobody is bound":       {2, true, []c{{ID: "a"}, {ID: "b"}}, "* *", "* *", "", ""},
		"no container":          {1, false, nil, "*", "", "", ""},
		"one, with as many":     {2, false, []c{{ID: "a", CPUs: "2-3"}}, "2-3 2-3", "*", "", "0"},
		"one, pinned":           {2, true, []c{{ID: "a", CPUs: "2-3"}}, "2 3", "*", "0-1,4-15", "0"},
		"fewer vCPUs than CPUs": {1, true, []c{{ID: "a", CPUs: "2-3"}}, "2-3", "*", "", "0"},
		"more vCPUs than CPUs":  {3, false, []c{{ID: "a", CPUs: "2-3"}}, "2-3 2-3 *", "0-1", "", ""},
		"more, pinned":          {3, true, []c{{ID: "a", CPUs: "2-3"}}, "2 3 0-1,4-15", "0-1", "0-1,4-15", ""},
		"two of their own":      {2, true, []c{{ID: "a", CPUs: "2"}, {ID: "b", CPUs: "3"}}, "2 3", "0 1", "0-1,4-15", "0"},
		"over two nodes":        {2, true, []c{{ID: "a", CPUs: "2"}, {ID: "b", CPUs: "9"}}, "2 9", "0 1", "0-1,3-8,10-15", ""},
		"one is not bound":      {2, false, []c{{ID: "a", CPUs: "2"}, {ID: "b"}}, "2 *", "0 *", "", ""},
		"a pool larger than the VM": {
			2, true, []c{{ID: "a", CPUs: "0-15"}, {ID: "b", CPUs: "0-15"}}, "0-15 0-15", "* *", "", "",
		},
		"CPUs of its own, and a pool": {
			4, true,
			[]c{{ID: "a", CPUs: "0-1,4-15", NanoCPUs: 5e8}, {ID: "b", CPUs: "2-3", NanoCPUs: 2e9}, {ID: "c", CPUs: "0-1,4-15", NanoCPUs: 15e8}},
			"0-1,4-15 0-1,4-15 2 3", "0-1 2-3 0-1", "0-1,4-15", "",
		},
		"the pool is the smaller one": {
			5, true,
			[]c{{ID: "a", CPUs: "0-1", NanoCPUs: 5e8}, {ID: "b", CPUs: "4-7", NanoCPUs: 4e9}},
			"0-1 4 5 6 7", "0 1-4", "0-3,8-15", "0",
		},
		"without limits, to the most room": {
			4, false, []c{{ID: "a", CPUs: "0-1"}, {ID: "b", CPUs: "4-7"}}, "0-1 4-7 4-7 4-7", "0 1-3", "", "0",
		},
		"overlapping": {
			3, true, []c{{ID: "a", CPUs: "0-1"}, {ID: "b", CPUs: "1-2"}}, "0 1 2", "0-1 1-2", "3-15", "0",
		},
		"within another": {
			2, false, []c{{ID: "a", CPUs: "0-7"}, {ID: "b", CPUs: "0-5"}}, "0-5 6-7", "* 0", "", "0",
		},
		"within another, one vCPU": {
			1, false, []c{{ID: "a", CPUs: "0-7"}, {ID: "b", CPUs: "0-5"}}, "0-5", "* *", "", "0",
		},
		"three that overlap in one": {
			2, false, []c{{ID: "a", CPUs: "0-1"}, {ID: "b", CPUs: "1-2"}, {ID: "c", CPUs: "1,8-9"}}, "1 8-9", "0 0 *", "", "",
		},
		"all of the host, pinned":  {16, true, []c{{ID: "a", CPUs: "0-15"}}, "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "*", "", ""},
		"memory of one node":       {1, false, []c{{ID: "a", Mems: "1"}, {ID: "b"}}, "*", "* *", "", "1"},
		"memory of a common node":  {1, false, []c{{ID: "a", Mems: "0-1"}, {ID: "b", Mems: "1"}}, "*", "* *", "", "1"},
		"memory of all":            {1, false, []c{{ID: "a", Mems: "0-1"}}, "*", "*", "", ""},
		"memory far from the CPUs": {1, false, []c{{ID: "a", CPUs: "0-3", Mems: "1"}}, "0-3", "*", "", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			h, given := host(), slices.Clone(tt.containers)
			p, err := Place(h, tt.vcpus, tt.pin, tt.containers)
			if err != nil {
				t.Fatal(err)
			}
			var cpus, guest []string
			for _, v := range p.VCPUs {
				cpus = append(cpus, star(FormatList(v)))
			}
			for _, c := range tt.containers {
				guest = append(guest, star(p.Containers[c.ID]))
			}
			if got := strings.Join(cpus, " "); got != tt.cpus {
				t.Errorf("vCPUs on %s, want %s", got, tt.cpus)
			}
			if got := strings.Join(guest, " "); got != tt.guest {
				t.Errorf("containers on %s, want %s", got, tt.guest)
			}
			if got := FormatList(p.Helpers); got != tt.helpers {
				t.Errorf("helpers on %s, want %s", got, tt.helpers)
			}
			if got := FormatList(p.Nodes); got != tt.nodes {
				t.Errorf("nodes %s, want %s", got, tt.nodes)
			}
			if !slices.Equal(given, tt.containers) || !cmp.Equal(h, host()) {
				t.Error("what was given has changed")
			}
		})
	}
}

func star(list string) string {
	if list == "" {
		return "*"
	}
	return list
}

func TestPlaceRefuses(t *testing.T) {
	type c = Container
	for name, tt := range map[string]struct {
		containers []Container
		class      func(error) bool
		want       string
	}{
		"more sets than vCPUs":  {[]c{{ID: "b", CPUs: "3"}, {ID: "x"}, {ID: "a", CPUs: "1-2"}, {ID: "c", CPUs: "7"}}, errdefs.IsFailedPrecondition, "containers a, b, c are bound to 3 sets of the host's CPUs, each of which needs a vCPU, and the VM has 2"},
		"a CPU that is not":     {[]c{{ID: "a", CPUs: "14-17,20"}}, errdefs.IsFailedPrecondition, `container a: cpuset "14-17,20": the host has no CPU 16-17,20 in use; it has 0-15`},
		"no list":               {[]c{{ID: "a", CPUs: "0-"}}, errdefs.IsInvalidArgument, `container a: cpuset "0-"`},
		"a node that is not":    {[]c{{ID: "a", Mems: "2"}}, errdefs.IsFailedPrecondition, `container a: cpuset memory nodes "2": the host has no memory node 2 in use; it has 0-1`},
		"no list of nodes":      {[]c{{ID: "a", Mems: "all"}}, errdefs.IsInvalidArgument, `container a: cpuset memory nodes "all"`},
		"no memory they share":  {[]c{{ID: "b", Mems: "0"}, {ID: "a", Mems: "1"}}, errdefs.IsFailedPrecondition, "containers a, b are bound to memory nodes of which none is common"},
		"a CPU that is offline": {[]c{{ID: "a", CPUs: "8191"}}, errdefs.IsFailedPrecondition, "no CPU 8191"},
	} {
		p, err := Place(host(), 2, true, tt.containers)
		if !tt.class(err) || !strings.Contains(err.Error(), tt.want) || p.VCPUs != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever is asked for, the rules hold, and the order of the containers is nothing.
func TestPlaceKeepsItsRules(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for range 400 {
		var containers []Container
		for i := range r.IntN(5) {
			c := Container{ID: fmt.Sprint("c", i), NanoCPUs: r.Int64N(4e9)}
			if r.IntN(4) > 0 {
				first := r.IntN(16)
				c.CPUs = fmt.Sprintf("%d-%d", first, first+r.IntN(16-first))
			}
			containers = append(containers, c)
		}
		vcpus, pin := 1+r.IntN(18), r.IntN(2) == 0
		h := host()
		p, err := Place(h, vcpus, pin, containers)
		shuffled := slices.Clone(containers)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		again, errAgain := Place(h, vcpus, pin, shuffled)
		if !cmp.Equal(p, again) || fmt.Sprint(err) != fmt.Sprint(errAgain) {
			t.Fatalf("%v in another order: %+v, %v; %+v, %v", containers, p, err, again, errAgain)
		}
		if err != nil {
			refused++
			continue
		}
		if len(p.VCPUs) != vcpus {
			t.Fatalf("%d vCPUs are placed, of %d", len(p.VCPUs), vcpus)
		}
		load := map[string]int{}
		for _, cpus := range p.VCPUs {
			load[FormatList(cpus)]++
		}
		for _, c := range containers {
			if c.CPUs == "" {
				continue
			}
			bound, _ := ParseList(c.CPUs)
			own, _ := ParseList(p.Containers[c.ID])
			if p.Containers[c.ID] == "" {
				for v := range vcpus {
					own = append(own, v)
				}
			}
			for _, v := range own {
				cpus := p.VCPUs[v]
				if cpus == nil || len(without(cpus, bound)) > 0 {
					t.Fatalf("%v: %s runs on vCPU %d, which is on %s", containers, c.ID, v, FormatList(cpus))
				}
				if pin && len(cpus) == 1 && slices.Contains(p.Helpers, cpus[0]) {
					t.Fatalf("%v: helpers on CPU %d, which is vCPU %d's", containers, cpus[0], v)
				}
				if n := load[FormatList(cpus)]; n > len(cpus) {
					t.Fatalf("%v: %d vCPUs on %s", containers, n, FormatList(cpus))
				}
			}
			if len(own) == 0 {
				t.Fatalf("%v: %s runs nowhere", containers, c.ID)
			}
		}
	}
	if refused == 0 || refused > 200 {
		t.Errorf("%d of 400 are refused: the test does not test", refused)
	}
}
