package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// tableName is the name of the nftables table in the pod's namespace.
const tableName = "husk"

// A redirect is the nftables table that sends TCP connections made within a
// network namespace, to its own addresses, to the proxy:
//
//	table inet husk {
//	  chain output {
//	    type nat hook output priority dstnat; policy accept;
//	    meta nfproto ipv4 meta l4proto tcp fib daddr type local redirect to :v4
//	    meta nfproto ipv6 meta l4proto tcp fib daddr type local redirect to :v6
//	  }
//	}
//
// A connection to the proxy's own port is redirected to where it goes anyway, and
// forwarded as any other: the proxy dials the guest, not the namespace, so there
// is no loop.
//
// It does not go with this process: a namespace outlives its shim by moments only,
// and a table that is there already is one that a shim has left, and is replaced.
type redirect struct {
	ns    *os.File // a descriptor of its own
	table *nftables.Table
}

// newRedirect makes the table in ns.
func newRedirect(ns *os.File, to proxyPorts) (*redirect, error) {
	fd, err := unix.FcntlInt(ns.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	r := &redirect{
		ns:    os.NewFile(uintptr(fd), ns.Name()),
		table: &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet},
	}
	if err := r.make(to); err != nil {
		r.ns.Close()
		return nil, fmt.Errorf("make nftables table inet %s (needed of the host's kernel: nf_tables, nft_fib_inet, nft_redir): %w", tableName, err)
	}
	return r, nil
}

// make sends the whole as one transaction.
func (r *redirect) make(to proxyPorts) error {
	conn, err := nftables.New(nftables.WithNetNSFd(int(r.ns.Fd())))
	if err != nil {
		return err
	}
	conn.AddTable(r.table) // so that there is one to delete
	conn.DelTable(r.table)
	conn.AddTable(r.table)
	accept := nftables.ChainPolicyAccept
	chain := conn.AddChain(&nftables.Chain{
		Name: "output", Table: r.table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest, Policy: &accept,
	})
	for _, rule := range []struct {
		family byte
		port   uint16
	}{{unix.NFPROTO_IPV4, to.v4}, {unix.NFPROTO_IPV6, to.v6}} {
		if rule.port != 0 {
			conn.AddRule(&nftables.Rule{Table: r.table, Chain: chain, Exprs: redirectLocal(rule.family, rule.port)})
		}
	}
	return conn.Flush()
}

// close deletes the table; that it is gone already is no error. It is called
// once.
func (r *redirect) close() error {
	defer r.ns.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(r.ns.Fd())))
	if err == nil {
		conn.DelTable(r.table)
		err = conn.Flush()
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete nftables table inet %s: %w", tableName, err)
	}
	return nil
}

// redirectLocal is the rule: TCP of a family to a local address goes to port.
func redirectLocal(family byte, port uint16) []expr.Any {
	const register = 1
	is := func(data ...byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: data} }
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register}, is(family),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}, is(unix.IPPROTO_TCP),
		&expr.Fib{Register: register, ResultADDRTYPE: true, FlagDADDR: true},
		is(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)...),
		&expr.Immediate{Register: register, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Redir{RegisterProtoMin: register},
	}
}

// originalDst returns the destination of a connection before it was redirected.
func originalDst(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, errors.New("not a TCP connection")
	}
	var dst netip.AddrPort
	cerr := raw.Control(func(fd uintptr) {
		if local.IP.To4() != nil {
			var sa unix.RawSockaddrInet4
			err = getOriginalDst(fd, unix.SOL_IP, unsafe.Pointer(&sa), unsafe.Sizeof(sa))
			dst = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), hostOrder(sa.Port))
			return
		}
		var sa unix.RawSockaddrInet6
		err = getOriginalDst(fd, unix.SOL_IPV6, unsafe.Pointer(&sa), unsafe.Sizeof(sa))
		dst = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), hostOrder(sa.Port))
	})
	return dst, errors.Join(cerr, err)
}

// getOriginalDst reads SO_ORIGINAL_DST, which has the same number for IPv6.
func getOriginalDst(fd uintptr, level int, sa unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), unix.SO_ORIGINAL_DST, uintptr(sa), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return os.NewSyscallError("getsockopt SO_ORIGINAL_DST", errno)
	}
	return nil
}

// hostOrder converts a port of a socket address.
func hostOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}
