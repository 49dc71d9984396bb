// Command husk is the operator's tool: it checks whether this host can start
// pods, shows and directs those that run, copies files to and from containers, and
// tells which build it is.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// Exit statuses.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

// probeTimeout bounds the programs that check runs.
const probeTimeout = 20 * time.Second

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	c, ok := find(args[0], flags, stdout)
	switch {
	case slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]):
		fmt.Fprint(stdout, usage)
		return exitOK
	case !ok:
		return misused(stderr, fmt.Sprintf("unknown command %q", args[0]))
	}
	switch err := flags.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, c.help)
		return exitOK
	case err != nil:
		return misused(stderr, err.Error())
	case flags.NArg() > c.most && strings.HasPrefix(flags.Arg(c.most), "-"):
		return misused(stderr, fmt.Sprintf("%s: unexpected argument %q: flags come first", args[0], flags.Arg(c.most)))
	case flags.NArg() > c.most:
		return misused(stderr, fmt.Sprintf("%s: unexpected argument %q", args[0], flags.Arg(c.most)))
	case flags.NArg() < c.least:
		return misused(stderr, fmt.Sprintf("%s: %d arguments, want %d", args[0], flags.NArg(), c.least))
	}
	status, err := c.action()
	if err != nil {
		fmt.Fprintln(stderr, "husk:", err)
		return exitFailed
	}
	return status
}

func misused(stderr io.Writer, problem string) int {
	fmt.Fprintf(stderr, "husk: %s\nRun \"husk help\" for usage.\n", problem)
	return exitUsage
}
