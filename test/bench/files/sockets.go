package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/husk-containers/husk/test/bench/message"
	"github.com/husk-containers/husk/test/bench/sample"
)

// socketIn is where containers have the host's socket.
const socketIn = "/run/echo.sock"

// talks are the sizes of messages, and how many of each go there and back.
var talks = []struct {
	name        string
	size, trips int
}{
	{"8 B", 8, 1000},
	{"4 KiB", 4 << 10, 1000},
	{"4 MiB", 4 << 20, 20},
}

// sockets prints how containers talk with a server on a unix socket of the host's,
// which they have by a bind. A runtime may refuse that; then its column is empty,
// and what it said is printed.
func (b *bench) sockets(ctx context.Context, w io.Writer, p plan) (err error) {
	var list []load
	for _, t := range talks {
		if l := talk(t.name, t.size, t.trips, p.seconds); p.only.MatchString(l.name) {
			list = append(list, l)
		}
	}
	if len(list) == 0 {
		return nil
	}
	socket := filepath.Join(b.d.Dir, "echo.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen on the host: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- message.Serve(l) }() // ends when l and the containers do
	defer func() { err = errors.Join(err, b.end(context.WithoutCancel(ctx)), l.Close(), <-served) }()

	var containers []*container
	var refused []string
	for _, r := range []struct{ name, runtime string }{{"husk", husk}, {"runc", runc}} {
		c, err := b.start(ctx, r.name, r.runtime, bind(socket, socketIn))
		var no *refusal
		switch {
		case errors.As(err, &no):
			refused = append(refused, fmt.Sprintf("%s refused the socket: %s", r.name, no.said))
		case err != nil:
			return err
		default:
			containers = append(containers, c)
		}
	}
	// One that does not count: under TCG it has the guest's code translated.
	if _, err := compare(ctx, containers, list, 1, rootIn); err != nil {
		return fmt.Errorf("measure sockets: %w", err)
	}
	t, err := compare(ctx, containers, list, p.rounds, rootIn)
	if err != nil {
		return fmt.Errorf("measure sockets: %w", err)
	}
	t.columns = []string{"husk", "runc"}
	fmt.Fprintf(w, "### A unix socket of the host's: medians of %d interleaved pairs after one to warm up (least to most)\n\n", p.rounds)
	t.printPair(w)
	for _, line := range refused {
		fmt.Fprintf(w, "%s\n\n", line)
	}
	return nil
}

// talk is a load of messages of one size.
func talk(name string, size, trips, length int) load {
	return load{
		name: "socket, " + name,
		command: func(string) []string {
			return []string{"load", "talk", socketIn, strconv.Itoa(size), strconv.Itoa(trips), fmt.Sprintf("%ds", length)}
		},
		figures: func(output []byte) ([]figure, error) {
			var result struct {
				Times  []time.Duration
				Stream message.Stream
			}
			if err := json.Unmarshal(output, &result); err != nil {
				return nil, fmt.Errorf("read what load said: %w", err)
			}
			if len(result.Times) != trips || result.Stream.Took <= 0 {
				return nil, fmt.Errorf("there were %d messages of %d, and a stream took %v", len(result.Times), trips, result.Stream.Took)
			}
			rate := float64(result.Stream.Bytes) / (1 << 20) / result.Stream.Took.Seconds()
			return []figure{
				{name + " there and back: p50", seconds, sample.Quantile(result.Times, 0.5).Seconds()},
				{name + " there and back: p99", seconds, sample.Quantile(result.Times, 0.99).Seconds()},
				{fmt.Sprintf("stream of %d s by writes of %s", length, name), mebibytesPerSecond, rate},
			}, nil
		},
	}
}
