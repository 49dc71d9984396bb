// Command sockclient is what containers run in tests of the host's sockets: a client
// of unix sockets, and of SPIFFE's Workload API.
//
//	sockclient svid                  prints the id of the X.509 SVID that it fetches
//	sockclient ask PATH TEXT         sends TEXT, half-closes, and prints the answer
//	sockclient many PATH COUNT BYTES asks so often, ten at a time, and compares
//	sockclient hold PATH             prints what it is sent, until the other end closes
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// timeout bounds all that it does.
const timeout = 2 * time.Minute

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sockclient:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	switch {
	case len(args) == 1 && args[0] == "svid":
		svid, err := workloadapi.FetchX509SVID(ctx) // from SPIFFE_ENDPOINT_SOCKET
		if err != nil {
			return err
		}
		fmt.Println(svid.ID)
		return nil
	case len(args) == 3 && args[0] == "ask":
		answer, err := ask(args[1], args[2])
		fmt.Println(answer)
		return err
	case len(args) == 4 && args[0] == "many":
		count, err := strconv.Atoi(args[2])
		size, serr := strconv.Atoi(args[3])
		if err := errors.Join(err, serr); err != nil {
			return err
		}
		return many(args[1], count, size)
	case len(args) == 2 && args[0] == "hold":
		conn, err := net.Dial("unix", args[1])
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // it has ended
		_, err = io.Copy(os.Stdout, conn)
		return err
	}
	return fmt.Errorf("unknown arguments %q", args)
}

func ask(path, text string) (string, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return "", err
	}
	defer conn.Close()                        //nolint:errcheck // it has ended
	conn.SetDeadline(time.Now().Add(timeout)) //nolint:errcheck // unix sockets have them
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(conn, text)
		sent <- errors.Join(err, conn.(*net.UnixConn).CloseWrite())
	}()
	b, err := io.ReadAll(conn)
	return string(b), errors.Join(err, <-sent)
}

func many(path string, count, size int) error {
	numbers := make(chan int)
	errs := make(chan error, count)
	var workers sync.WaitGroup
	for range 10 {
		workers.Go(func() {
			for i := range numbers {
				text := strings.Repeat(strconv.Itoa(i%10), size)
				answer, err := ask(path, text)
				if err == nil && answer != text {
					err = fmt.Errorf("the answer has %d bytes of %d", len(answer), size)
				}
				if err != nil {
					errs <- fmt.Errorf("connection %d: %w", i, err)
				}
			}
		})
	}
	for i := range count {
		numbers <- i
	}
	close(numbers)
	workers.Wait()
	close(errs)
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}
