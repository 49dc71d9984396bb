package hostcheck

import (
	"fmt"
	"runtime"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TunUsable returns nil where the kernel offers tap interfaces, which a VM with
// a network needs.
func TunUsable() error {
	return deviceOpens("/dev/net/tun", "load the kernel module tun")
}

// VhostNetUsable returns nil where the kernel copies packets between a tap
// interface and a VM.
func VhostNetUsable() error {
	return deviceOpens("/dev/vhost-net", "load the kernel module vhost_net")
}

// NFTablesUsable returns nil where the kernel redirects connections to loopback by
// nftables. It tries that in a network namespace that ends with the call.
func NFTablesUsable() error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its namespace too.
		runtime.LockOSThread()
		result <- redirectInNewNamespace()
	}()
	return <-result
}

func redirectInNewNamespace() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make a network namespace: %w; run as root, on a kernel with CONFIG_NET_NS", err)
	}
	const remedy = "load the kernel modules nf_tables, nft_chain_nat and nft_redir"
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w; %s", err, remedy)
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "husk"})
	chain := conn.AddChain(&nftables.Chain{
		Name: "output", Table: table,
		Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
	})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		// meta l4proto tcp redirect to :256
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Immediate{Register: 1, Data: []byte{1, 0}},
		&expr.Redir{RegisterProtoMin: 1},
	}})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("add an nftables redirect: %w; %s", err, remedy)
	}
	return nil
}
