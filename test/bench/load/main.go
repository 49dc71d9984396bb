// Command load is what the benchmark of files and sockets does in a container:
//
//	load small DIR COUNT               create, stat and unlink so many files in one directory
//	load clone DIR FILES               write a tree such as git clone does, read it, remove it
//	load install DIR PACKAGES          the same of a tree such as npm install writes
//	load talk SOCKET SIZE COUNT TIME   messages there and back, then a stream of them
//	load watch KIND FILE               say when a change of the host's is seen
//	load hold FILE                     write, and keep the file open until standard input ends
//
// The first three print Phases, talk prints a Talk, as JSON; watch and hold print
// lines. DIR exists and is empty again at the end.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/husk-containers/husk/test/bench/message"
)

// A Phase is a part of a load, and the time that it took.
type Phase struct {
	Name string
	Took time.Duration
}

// Phases are what a load was made of, in order.
type Phases struct{ Phases []Phase }

// phase times f.
func (p *Phases) phase(name string, f func() error) error {
	began := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	p.Phases = append(p.Phases, Phase{name, time.Since(began)})
	return nil
}

// A Talk is the times of messages there and back, and a stream of such messages.
type Talk struct {
	Times  []time.Duration
	Stream message.Stream
}

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "load: %v\n", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage: load small DIR COUNT | clone DIR FILES | install DIR PACKAGES | talk SOCKET SIZE COUNT TIME | watch KIND FILE | hold FILE")

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	var result any
	var err error
	switch {
	case len(args) == 3 && trees[args[0]] != nil:
		n, parseErr := strconv.Atoi(args[2])
		if parseErr != nil || n < 1 {
			return errUsage
		}
		var p Phases
		err = trees[args[0]](&p, args[1], n)
		result = p
	case len(args) == 5 && args[0] == "talk":
		result, err = talk(args[1], args[2], args[3], args[4])
	case len(args) == 3 && args[0] == "watch" && sights[args[1]] != nil:
		return watch(sights[args[1]], args[2], stdout)
	case len(args) == 2 && args[0] == "hold":
		return hold(args[1], stdin, stdout)
	default:
		return errUsage
	}
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	return json.NewEncoder(stdout).Encode(result)
}

// trees are the loads of many files.
var trees = map[string]func(*Phases, string, int) error{"small": small, "clone": clone, "install": install}

func talk(socket, sizeText, countText, lengthText string) (Talk, error) {
	size, err := strconv.Atoi(sizeText)
	if err != nil {
		return Talk{}, errUsage
	}
	count, err := strconv.Atoi(countText)
	if err != nil {
		return Talk{}, errUsage
	}
	length, err := time.ParseDuration(lengthText)
	if err != nil {
		return Talk{}, errUsage
	}
	var t Talk
	err = connected(socket, func(conn *net.UnixConn) (err error) {
		t.Times, err = message.Echo(conn, size, count)
		return err
	})
	if err != nil {
		return Talk{}, err
	}
	err = connected(socket, func(conn *net.UnixConn) (err error) {
		t.Stream, err = message.Send(conn, size, length)
		return err
	})
	return t, err
}

func connected(socket string, f func(*net.UnixConn) error) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(conn)
}
