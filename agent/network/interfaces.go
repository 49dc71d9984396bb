package network

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	agentv1 "github.com/husk-containers/husk/protocols/agent/v1"
)

// maxReported is the protocol's.
const maxReported = 64

// Interfaces tells what went through each interface but loopback. It waits for no call
// of SetNetwork.
func (*Stack) Interfaces() ([]*agentv1.InterfaceStats, error) {
	content, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return nil, fmt.Errorf("read statistics of interfaces: %w", err)
	}
	return parseInterfaces(content), nil
}

// parseInterfaces parses /proc/net/dev, whose first two lines are headings:
//
//	eth0:  rx bytes packets errs drop fifo frame compressed multicast  tx bytes packets errs drop ...
func parseInterfaces(content []byte) []*agentv1.InterfaceStats {
	var all []*agentv1.InterfaceStats
	for line := range bytes.Lines(content) {
		name, rest, ok := bytes.Cut(line, []byte(":")) // no name has one
		name = bytes.TrimSpace(name)
		f := bytes.Fields(rest)
		if !ok || len(f) < 16 || string(name) == "lo" || len(all) == maxReported {
			continue
		}
		n := func(i int) uint64 {
			v, _ := strconv.ParseUint(string(f[i]), 10, 64) //nolint:errcheck // the kernel writes numbers
			return v
		}
		all = append(all, &agentv1.InterfaceStats{
			Name:    string(name),
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		})
	}
	return all
}
