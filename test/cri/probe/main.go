// Command probe does in a container, or on its node, what no applet of busybox
// does: it lists trees, watches volumes, and meets others of its kind on them.
//
//	probe tree DIR...          list all that is there, with modes, owners and content
//	probe watch KEY DIR...     print a volume's key each time that the volume is updated
//	probe read KEY... -- DIR... read all keys again and again, and print what does not fit
//	probe serve DIR...         do for use what takes two
//	probe use DIR...           try sockets, FIFOs, locks and events with serve
//	probe fuse DEVICE DIR      mount a file system by FUSE, and answer its first request
//	probe huge FILE BYTES      map and fill memory of huge pages
package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("needs a command and its arguments")
	}
	command, args := args[0], args[1:]
	switch command {
	case "tree":
		return each(args, tree)
	case "watch":
		return watch(args[0], args[1:])
	case "read":
		i := slices.Index(args, "--")
		if i < 0 {
			return errors.New("read KEY... -- DIR...")
		}
		return read(args[:i], args[i+1:])
	case "serve":
		return serve(args)
	case "use":
		return each(args, use)
	case "fuse":
		return fuse(args[0], args[1])
	case "huge":
		size, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return huge(args[0], size)
	}
	return fmt.Errorf("unknown command %q", command)
}

// each goes on after an error.
func each(dirs []string, do func(dir string) error) error {
	var errs []error
	for _, dir := range dirs {
		if err := do(dir); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}
