package cri

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"golang.org/x/net/websocket"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// portForwardProtocol is the form of port forwarding that needs no SPDY: each
// message begins with its channel's number. Of a port, channel 0 is the data and
// channel 1 an error message; the first message of both is the port, in two
// bytes, least significant first.
const portForwardProtocol = "v4.channel.k8s.io"

// forward has CRI connect to a port of the pod, sends a request and returns all
// that comes back until the other end closes.
func (p *pod) forward(port uint16, request string) (string, error) {
	ctx, cancel := p.e.call()
	defer cancel()
	r, err := p.e.cri.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: p.id, Port: []int32{int32(port)}})
	if err != nil {
		return "", err
	}
	u, err := url.Parse(r.Url)
	if err != nil {
		return "", err
	}
	u.Scheme = "ws"
	u.RawQuery = fmt.Sprintf("port=%d", port)
	config, err := websocket.NewConfig(u.String(), "http://localhost/")
	if err != nil {
		return "", err
	}
	config.Protocol = []string{portForwardProtocol}
	conn, err := dialIn(p.e.d.NetNS(), "tcp", u.Host)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		return "", err
	}
	ws.PayloadType = websocket.BinaryFrame
	if _, err := ws.Write(append([]byte{0}, request...)); err != nil {
		return "", err
	}
	var answer, refusal []byte
	greeted := [2]bool{}
	for {
		var message []byte
		err := websocket.Message.Receive(ws, &message)
		if err != nil {
			if len(refusal) > 0 {
				return "", errors.New(string(refusal))
			}
			if errors.Is(err, io.EOF) && len(answer) > 0 {
				return string(answer), nil
			}
			return "", err
		}
		if len(message) == 0 || message[0] > 1 {
			return "", fmt.Errorf("message %q of no channel", message)
		}
		channel, data := message[0], message[1:]
		switch {
		case !greeted[channel]:
			greeted[channel] = true
			if len(data) != 2 || binary.LittleEndian.Uint16(data) != port {
				return "", fmt.Errorf("first message of channel %d %q, want port %d", channel, data, port)
			}
		case channel == 0:
			answer = append(answer, data...)
		default:
			refusal = append(refusal, data...)
		}
	}
}
