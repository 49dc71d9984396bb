// Command hog takes all of one thing that there is, as a container that harms its
// neighbours does; and measures, as a neighbour, what of it is felt:
//
//	hog cpu user|system     burn one CPU, in user space or in the kernel
//	hog memory MIB          touch so much anonymous memory and keep it; 0: without end
//	hog cache FILE MIB      write a file, and leave it in the page cache
//	hog disk DIR            fill a file system with files, remove them, begin again
//	hog fds DIR             open as many files and sockets as there may be
//	hog fork                a fork bomb
//	hog log                 write lines to standard output without end
//	hog threads N           keep so many threads, each asleep
//	hog probe DIR           print each second the worst latency of what a neighbour does
//
// Each prints "ready", or what it has come to, once it is at work.
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hog:", err)
		os.Exit(1)
	}
}

// number of arguments by command.
var number = map[string]int{"cpu": 1, "memory": 1, "cache": 2, "disk": 1, "fds": 1, "fork": 0, "log": 0, "threads": 1, "probe": 1}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("needs a command")
	}
	command, args := args[0], args[1:]
	if n, ok := number[command]; !ok || n != len(args) {
		return fmt.Errorf("no command %q of %d arguments", command, len(args))
	}
	switch command {
	case "cpu":
		return burn(args[0])
	case "memory":
		return counted(args[0], memory)
	case "cache":
		return counted(args[1], func(mib int) error { return cache(args[0], mib) })
	case "disk":
		return disk(args[0])
	case "fds":
		return fds(args[0])
	case "fork":
		return fork()
	case "log":
		return flood()
	case "threads":
		return counted(args[0], threads)
	}
	return probe(args[0])
}

func counted(text string, do func(n int) error) error {
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is no number", text)
	}
	return do(n)
}
