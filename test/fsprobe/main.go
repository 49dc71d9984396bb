// Command fsprobe tries what a file system can do, one property after another,
// and prints what came of it in lines that do not depend on when and where it
// runs, so that two runs can be compared:
//
//	fsprobe [-v] [-only property,...] directory...
//
// Each property has a new directory of its own below the one that is given, and
// leaves it there. A line is
//
//	bind/rename over an open file: ok
//
// the last element of the directory, the property, what was tried, and the result:
// "ok", the name of an errno, or what was seen. See show.go for what else it does.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/husk-containers/husk/test/fsprobe/file"
	"github.com/husk-containers/husk/test/fsprobe/owner"
	"github.com/husk-containers/husk/test/fsprobe/try"
)

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) > 0 && args[0] == try.PeerCommand:
		err = try.Serve(os.Stdin, os.Stdout)
	case len(args) > 0 && args[0] == "show":
		err = show(args[1:], os.Stdout)
	default:
		err = probe(args, os.Stdout)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "fsprobe: %v\n", err)
		os.Exit(1)
	}
}

func probe(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("fsprobe", flag.ExitOnError)
	only := flags.String("only", "", "comma-separated `properties` to try; all if empty")
	verbose := flags.Bool("v", false, "print how long each property took, on standard error")
	flags.Parse(args) //nolint:errcheck // exits
	for _, root := range flags.Args() {
		for _, p := range slices.Concat(owner.Probes(), file.Probes()) {
			if *only != "" && !slices.Contains(strings.Split(*only, ","), p.Name) {
				continue
			}
			began := time.Now()
			unix.Umask(0o022)
			t := &try.T{Out: out, Name: filepath.Base(root) + "/" + p.Name, Dir: filepath.Join(root, p.Name)}
			if err := os.Mkdir(t.Dir, 0o777); err != nil {
				return err
			}
			if err := p.Run(t); err != nil {
				t.Say("gave up", err.Error())
			}
			if *verbose {
				fmt.Fprintf(os.Stderr, "%s took %v\n", t.Name, time.Since(began))
			}
		}
	}
	return nil
}
