package listen

import "golang.org/x/sys/unix"

// An insn is one instruction of BPF, as the kernel takes it.
type insn struct {
	op   uint8
	regs uint8 // destination, and source << 4
	off  int16 // of a jump: in instructions, from the next one
	imm  int32
}

// Registers: r0 is what a call or the program returns, r1 to r5 are arguments and
// lost in a call, r6 to r9 are kept in one, r10 is the top of the stack.
const (
	r0 = iota
	r1
	r2
	r3
	r4
	_
	r6
	r7
	r10 = 10
)

// Sizes of loads and stores.
const (
	size64 = unix.BPF_DW
	size32 = unix.BPF_W
	size16 = unix.BPF_H
)

// Helper functions of the kernel, by their number in linux/bpf.h.
const (
	mapUpdate     = 2
	mapDelete     = 3
	socketCookie  = 46
	callbacksSet  = 59
	netnsCookieOf = 122
	ringbufOutput = 130
)

func mov(dst, src uint8) insn {
	return insn{op: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X, regs: dst | src<<4}
}

func set(dst uint8, v int32) insn {
	return insn{op: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K, regs: dst, imm: v}
}

func add(dst uint8, v int32) insn {
	return insn{op: unix.BPF_ALU64 | unix.BPF_ADD | unix.BPF_K, regs: dst, imm: v}
}

func load(size, dst, src uint8, off int16) insn {
	return insn{op: unix.BPF_LDX | unix.BPF_MEM | size, regs: dst | src<<4, off: off}
}

func store(size, dst uint8, off int16, src uint8) insn {
	return insn{op: unix.BPF_STX | unix.BPF_MEM | size, regs: dst | src<<4, off: off}
}

func storeConst(size, dst uint8, off int16, v int32) insn {
	return insn{op: unix.BPF_ST | unix.BPF_MEM | size, regs: dst, off: off, imm: v}
}

// hostOrder converts 16 bits from network order.
func hostOrder(dst uint8) insn {
	return insn{op: unix.BPF_ALU | unix.BPF_END | unix.BPF_TO_BE, regs: dst, imm: 16}
}
func call(helper int32) insn { return insn{op: unix.BPF_JMP | unix.BPF_CALL, imm: helper} }
func exit() insn             { return insn{op: unix.BPF_JMP | unix.BPF_EXIT} }

// mapOf loads a map, by its descriptor: one instruction in two.
func mapOf(dst uint8, fd int) []insn {
	return []insn{{op: unix.BPF_LD | unix.BPF_IMM | unix.BPF_DW, regs: dst | unix.BPF_PSEUDO_MAP_FD<<4, imm: int32(fd)}, {}}
}

// when is then where r is v, and nothing where it is not.
func when(r uint8, v int32, then []insn) []insn {
	return append([]insn{{op: unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K, regs: r, off: int16(len(then)), imm: v}}, then...)
}

// unless is then where r is not v.
func unless(r uint8, v int32, then []insn) []insn {
	return append([]insn{{op: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, regs: r, off: int16(len(then)), imm: v}}, then...)
}

func join(parts ...[]insn) []insn {
	var all []insn
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// The stack of the programs: a key and a value of the table.
const (
	keyAt      = -8
	valueAt    = keyAt - 32 // see socket
	netnsAt    = valueAt
	addrAt     = valueAt + 8
	portAt     = valueAt + 24
	familyAt   = valueAt + 28
	protocolAt = valueAt + 30
)

// A program is one with where it is attached.
type program struct {
	kind   uint32 // BPF_PROG_TYPE_*
	attach uint32 // BPF_CGROUP_*
	code   []insn
}

// programs are those that keep the table sockets and wake the reader of ring;
// both are descriptors of maps. All let every call pass.
func programs(sockets, ring int) []program {
	const ( // of sock_ops
		stateChange = 10 // BPF_SOCK_OPS_STATE_CB: args are the old state and the new
		tcpListen   = 11 // BPF_SOCK_OPS_TCP_LISTEN_CB
		wantState   = 4  // BPF_SOCK_OPS_STATE_CB_FLAG
		stateListen = 10 // TCP_LISTEN
	)
	begin := []insn{mov(r6, r1)}
	end := []insn{set(r0, 1), exit()}
	wake := join(mapOf(r1, ring), []insn{
		mov(r2, r10), add(r2, keyAt), set(r3, 8), set(r4, unix.BPF_RB_FORCE_WAKEUP), call(ringbufOutput),
	})
	key := []insn{mov(r1, r6), call(socketCookie), store(size64, r10, keyAt, r0)}
	// put adds the socket, of which fill stores address, family and port.
	put := func(protocol int32, fill []insn) []insn {
		return join(key, []insn{
			mov(r1, r6), call(netnsCookieOf), store(size64, r10, netnsAt, r0),
			storeConst(size64, r10, addrAt, 0), storeConst(size64, r10, addrAt+8, 0),
			storeConst(size16, r10, protocolAt, protocol),
		}, fill, mapOf(r1, sockets), []insn{
			mov(r2, r10), add(r2, keyAt), mov(r3, r10), add(r3, valueAt), set(r4, 0), call(mapUpdate),
		}, wake)
	}
	remove := join(key, mapOf(r1, sockets), []insn{mov(r2, r10), add(r2, keyAt), call(mapDelete)}, when(r0, 0, wake))
	// addr copies n words of the context.
	addr := func(family int32, from int16, n int16) []insn {
		code := []insn{storeConst(size16, r10, familyAt, family)}
		for i := range n {
			code = append(code, load(size32, r3, r6, from+4*i), store(size32, r10, addrAt+4*i, r3))
		}
		return code
	}
	// Offsets in struct bpf_sock_ops: op 0, args 4, family 20, local_ip4 28,
	// local_ip6 48, local_port (this machine's order) 68.
	tcp := join(begin, []insn{load(size32, r7, r6, 0), storeConst(size16, r10, familyAt, 0)},
		when(r7, tcpListen, join(put(unix.IPPROTO_TCP, join(
			[]insn{load(size32, r2, r6, 20)},
			when(r2, unix.AF_INET, addr(unix.AF_INET, 28, 1)),
			when(r2, unix.AF_INET6, addr(unix.AF_INET6, 48, 4)),
			[]insn{load(size32, r3, r6, 68), store(size32, r10, portAt, r3)},
		)), []insn{mov(r1, r6), set(r2, wantState), call(callbacksSet)})),
		when(r7, stateChange, join([]insn{load(size32, r2, r6, 4)}, when(r2, stateListen, remove))), end)
	// In struct bpf_sock_addr: user_ip4 4, user_ip6 8, user_port (network order) 24,
	// protocol 36.
	bind := func(family int32, from, n int16) []insn {
		return join(begin, []insn{load(size32, r2, r6, 36), load(size32, r3, r6, 24)},
			when(r2, unix.IPPROTO_UDP, unless(r3, 0, put(unix.IPPROTO_UDP, join(addr(family, from, n), []insn{
				load(size32, r3, r6, 24), hostOrder(r3), store(size32, r10, portAt, r3),
			})))), end)
	}
	return []program{
		{unix.BPF_PROG_TYPE_SOCK_OPS, unix.BPF_CGROUP_SOCK_OPS, tcp},
		{unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, unix.BPF_CGROUP_INET4_BIND, bind(unix.AF_INET, 4, 1)},
		{unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, unix.BPF_CGROUP_INET6_BIND, bind(unix.AF_INET6, 8, 4)},
		{unix.BPF_PROG_TYPE_CGROUP_SOCK, unix.BPF_CGROUP_INET_SOCK_RELEASE, join(begin, remove, end)},
	}
}
