// Command husk is the operator's tool: it checks whether this host can start
// pods, copies files to and from containers, and tells which build it is.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"
)

const usage = `husk - the operator's tool of Husk

Usage:
  husk check [-config FILE]      check whether this host can start pods
  husk cp [FLAG]... SRC DST      copy files to or from a container; see husk cp -h
  husk version [-json]           print version, commit and Go version
  husk help                      print this

check reads FILE, or else the file that HUSK_CONFIG names, or else
/etc/husk/configuration.toml. It prints a line per requirement, "ok", "warn" or
"FAIL", with cause and remedy. It should run as root, as the shim does.

Exit status: 0 all is well, 1 no pod can start here or nothing was copied, 2 wrong
usage.
`

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
	var action func() (int, error)
	help, wanted := usage, 0
	switch args[0] {
	case "check":
		file := flags.String("config", "", "")
		action = func() (int, error) { return runCheck(*file, stdout) }
	case "cp":
		action, help, wanted = copyAction(flags, stdout), copyUsage, 2
	case "version":
		asJSON := flags.Bool("json", false, "")
		action = func() (int, error) { return exitOK, printVersion(stdout, *asJSON) }
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return exitOK
	default:
		return misused(stderr, fmt.Sprintf("unknown command %q", args[0]))
	}
	switch err := flags.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, help)
		return exitOK
	case err != nil:
		return misused(stderr, err.Error())
	case flags.NArg() > wanted:
		return misused(stderr, fmt.Sprintf("%s: unexpected argument %q", args[0], flags.Arg(wanted)))
	case flags.NArg() < wanted:
		return misused(stderr, fmt.Sprintf("%s: %d arguments, want %d", args[0], flags.NArg(), wanted))
	}
	status, err := action()
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
