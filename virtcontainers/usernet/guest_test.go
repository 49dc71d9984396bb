package usernet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// A guest is as much of a network stack as the tests need, at the other end of
// passt. It drops all that it does not wait for.
type guest struct {
	t      *testing.T
	stream *os.File
	port   uint16 // the last one used
}

// Numbers of protocols.
const (
	ethIPv4, ethIPv6          = 0x0800, 0x86dd
	protoICMP, protoTCP       = 1, 6
	protoUDP, protoICMPv6     = 17, 58
	tcpFIN, tcpSYN            = 0x01, 0x02
	tcpRST, tcpPSH, tcpACK    = 0x04, 0x08, 0x10
	echoRequest, echoReply    = 8, 0
	echoRequest6, echoReply6  = 128, 129
	neighbourWho, neighbourIs = 135, 136
)

func newGuest(t *testing.T, n *Network) *guest {
	stream := n.NIC().Stream
	if err := stream.SetDeadline(time.Now().Add(timeout)); err != nil {
		t.Fatal(err)
	}
	return &guest{t: t, stream: stream, port: 40000}
}

func (g *guest) self(peer netip.Addr) netip.Addr {
	switch {
	case peer.Is4():
		return guest4.Addr()
	case peer.IsLinkLocalUnicast():
		return netip.MustParseAddr("fe80::ff:fe00:1") // made of the MAC address
	}
	return guest6.Addr()
}

// sum is the Internet checksum (RFC 1071).
func sum(parts ...[]byte) uint16 {
	data := bytes.Join(parts, nil)
	if len(data)%2 == 1 {
		data = append(data, 0)
	}
	total := uint32(0)
	for i := 0; i < len(data); i += 2 {
		total += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}

// send sends a payload that has its checksum, over the pseudo header, at an offset.
func (g *guest) send(peer netip.Addr, proto byte, payload []byte, checksumAt int) {
	g.t.Helper()
	src, dst := g.self(peer).AsSlice(), peer.AsSlice()
	pseudo := append(bytes.Join([][]byte{src, dst}, nil), 0, proto)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(payload)))
	if proto == protoICMP {
		pseudo = nil
	}
	binary.BigEndian.PutUint16(payload[checksumAt:], sum(pseudo, payload))
	frame := append([]byte{0x0a, 0x68, 0x75, 0x73, 0x6b, 1}, testMAC...)
	if peer.Is4() {
		head := binary.BigEndian.AppendUint16([]byte{0x45, 0}, uint16(20+len(payload)))
		head = append(head, 0, 0, 0x40, 0, 64, proto, 0, 0)
		head = append(append(head, src...), dst...)
		binary.BigEndian.PutUint16(head[10:], sum(head))
		frame = append(binary.BigEndian.AppendUint16(frame, ethIPv4), head...)
	} else {
		frame = append(binary.BigEndian.AppendUint16(frame, ethIPv6), 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(payload)))
		frame = append(append(append(frame, proto, 255), src...), dst...)
	}
	frame = append(frame, payload...)
	if _, err := g.stream.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
		g.t.Fatalf("write a frame: %v", err)
	}
}

// receive returns the next payload of a protocol from a peer that is wanted.
func (g *guest) receive(peer netip.Addr, proto byte, wanted func([]byte) bool) []byte {
	g.t.Helper()
	for {
		frame, err := readFrame(g.stream)
		if err != nil {
			g.t.Fatalf("read a frame of protocol %d from %s: %v", proto, peer, err)
		}
		if payload, err := parse(frame, peer, g.self(peer), proto); err == nil && wanted(payload) {
			return payload
		}
	}
}

func parse(frame []byte, src, dst netip.Addr, proto byte) ([]byte, error) {
	other := errors.New("other")
	if len(frame) < 14 {
		return nil, other
	}
	packet := frame[14:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == ethIPv4 && src.Is4() && len(packet) >= 20:
		end := int(binary.BigEndian.Uint16(packet[2:]))
		if packet[9] == proto && bytes.Equal(packet[12:20], append(src.AsSlice(), dst.AsSlice()...)) && 20 <= end && end <= len(packet) {
			return packet[20:end], nil
		}
	case kind == ethIPv6 && src.Is6() && len(packet) >= 40:
		end := 40 + int(binary.BigEndian.Uint16(packet[4:]))
		if packet[6] == proto && bytes.Equal(packet[8:40], append(src.AsSlice(), dst.AsSlice()...)) && end <= len(packet) {
			return packet[40:end], nil
		}
	}
	return nil, other
}

// ports is the start of a TCP or UDP header to peer, with a source port of its own.
func (g *guest) ports(peer netip.AddrPort) []byte {
	g.port++
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, g.port), peer.Port())
}

// from tells whether a TCP or UDP header is of the flow from peer.
func (g *guest) from(peer netip.AddrPort, payload []byte) bool {
	return len(payload) >= 8 && binary.BigEndian.Uint16(payload) == peer.Port() && binary.BigEndian.Uint16(payload[2:]) == g.port
}

// tcp makes a connection, sends a line and returns what comes back before the
// peer's FIN.
func (g *guest) tcp(peer netip.AddrPort, line string) string {
	g.t.Helper()
	ports := g.ports(peer)
	seq, ack := uint32(1000), uint32(0)
	segment := func(flags byte, data string) {
		s := binary.BigEndian.AppendUint32(bytes.Clone(ports), seq)
		s = binary.BigEndian.AppendUint32(s, ack)
		s = append(s, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
		g.send(peer.Addr(), protoTCP, append(s, data...), 16)
	}
	segment(tcpSYN, "")
	answer := g.receive(peer.Addr(), protoTCP, func(s []byte) bool { return len(s) >= 20 && g.from(peer, s) })
	if flags := answer[13]; flags&tcpRST != 0 {
		return "RST"
	} else if flags&(tcpSYN|tcpACK) != tcpSYN|tcpACK {
		g.t.Fatalf("answer to SYN has flags %#x", flags)
	}
	seq++
	ack = binary.BigEndian.Uint32(answer[4:]) + 1
	segment(tcpACK, "") // passt drops what comes with it
	segment(tcpACK|tcpPSH, line)
	seq += uint32(len(line))
	var got []byte
	for {
		s := g.receive(peer.Addr(), protoTCP, func(s []byte) bool {
			return len(s) >= 20 && g.from(peer, s) && binary.BigEndian.Uint32(s[4:]) == ack
		})
		data := s[min(len(s), int(s[12]>>4)*4):]
		got = append(got, data...)
		ack += uint32(len(data))
		switch {
		case s[13]&tcpRST != 0:
			return string(got) + " RST"
		case s[13]&tcpFIN != 0:
			ack++
			segment(tcpACK|tcpFIN, "")
			return string(got)
		case len(data) > 0:
			segment(tcpACK, "")
		}
	}
}

// udp sends a datagram and returns the one that comes back.
func (g *guest) udp(peer netip.AddrPort, data string) string {
	g.t.Helper()
	d := binary.BigEndian.AppendUint16(g.ports(peer), uint16(8+len(data)))
	g.send(peer.Addr(), protoUDP, append(append(d, 0, 0), data...), 6)
	return string(g.receive(peer.Addr(), protoUDP, func(d []byte) bool { return g.from(peer, d) })[8:])
}

// ping sends an echo request and returns the reply's data.
func (g *guest) ping(peer netip.Addr, data string) string {
	g.t.Helper()
	proto, kind, reply := byte(protoICMP), byte(echoRequest), byte(echoReply)
	if peer.Is6() {
		proto, kind, reply = protoICMPv6, echoRequest6, echoReply6
	}
	g.send(peer, proto, append([]byte{kind, 0, 0, 0, 0x12, 0x34, 0, 1}, data...), 2)
	return string(g.receive(peer, proto, func(d []byte) bool { return len(d) >= 8 && d[0] == reply })[8:])
}

// neighbour asks for an IPv6 peer's MAC address (RFC 4861).
func (g *guest) neighbour(peer netip.Addr) string {
	g.t.Helper()
	who := append(make([]byte, 8), peer.AsSlice()...)
	who[0] = neighbourWho
	g.send(peer, protoICMPv6, append(append(who, 1, 1), testMAC...), 2)
	for { // the answer comes from passt's link-local address
		is, err := readFrame(g.stream)
		if err != nil {
			g.t.Fatalf("read a neighbour advertisement: %v", err)
		}
		const head = 14 + 40
		if len(is) >= head+32 && binary.BigEndian.Uint16(is[12:]) == ethIPv6 && is[head] == neighbourIs && bytes.Equal(is[head+8:head+24], peer.AsSlice()) {
			return net.HardwareAddr(is[head+26 : head+32]).String()
		}
	}
}

// listen answers the first connection, or datagram, at an address of the host with
// what it gets and the number of bytes, and says so.
func listen(t *testing.T, network, addr string) netip.AddrPort {
	t.Helper()
	if network == "udp" {
		conn, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() { // ends with the test
			data := make([]byte, 64<<10)
			if n, from, err := conn.ReadFrom(data); err == nil {
				_, _ = conn.WriteTo(fmt.Appendf(nil, "%d %s", n, data[:n]), from)
			}
		}()
		return netip.MustParseAddrPort(conn.LocalAddr().String())
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the test
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		data := make([]byte, 64<<10)
		n, _ := conn.Read(data)
		fmt.Fprintf(conn, "%d %s", n, data[:n])
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}
