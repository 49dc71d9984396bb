package modindex

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func sample(t *testing.T) Index {
	t.Helper()
	x := Index{
		{Name: "tun", Aliases: []string{"char-major-10-200", "devname:net/tun"}},
		{Name: "udp_tunnel"},
		{Name: "vxlan", Needs: []string{"ip6_udp_tunnel", "udp_tunnel"}, Aliases: []string{"rtnl-link-vxlan"}},
		{Name: "loop", Aliases: []string{"block-major-7-*"}},
		{Name: "xt_nat", Aliases: []string{"ipt_SNAT", "ipt_DNAT"}},
		{Name: "other", Aliases: []string{"ipt_SNAT"}},
	}
	var b bytes.Buffer
	if err := x.Write(&b); err != nil {
		t.Fatal(err)
	}
	got, err := Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got { // no difference to Resolve
		got[i].Needs, got[i].Aliases = slices.Clip(got[i].Needs), slices.Clip(got[i].Aliases)
		if len(got[i].Needs) == 0 {
			got[i].Needs = nil
		}
		if len(got[i].Aliases) == 0 {
			got[i].Aliases = nil
		}
	}
	if diff := cmp.Diff(x, got); diff != "" {
		t.Fatalf("(-written +read):\n%s", diff)
	}
	return got
}

func TestResolve(t *testing.T) {
	x := sample(t)
	for request, want := range map[string]string{
		"tun":               "tun",
		"char-major-10-200": "tun",
		"char_major_10_200": "tun",
		"char-major-10-20":  "",
		"rtnl-link-vxlan":   "ip6_udp_tunnel udp_tunnel vxlan",
		"udp-tunnel":        "udp_tunnel",
		"block-major-7-3":   "loop",
		"ipt_SNAT":          "xt_nat other",
		"":                  "",
		"*":                 "",
		"[":                 "",
	} {
		if got := strings.Join(x.Resolve(request), " "); got != want {
			t.Errorf("%q: %q, want %q", request, got, want)
		}
	}
}

func TestReadRejects(t *testing.T) {
	if _, err := Read(strings.NewReader("tun , char\nalone\n")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("error %v", err)
	}
}
