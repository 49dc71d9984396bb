package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

const (
	// patience is for how long a change is looked for.
	patience = 4 * time.Second
	// interval is between looks: to look is what is measured, and no event comes
	// from the host.
	interval = 5 * time.Millisecond
)

// changed is what the host writes behind a file's "old", or puts in its stead.
const changed = "new"

// A sight is a way to look at a file. It returns a look, which is asked until it
// sees the change, and the end of it.
type sight func(name string) (look func() (bool, error), end func() error, err error)

// sights are the kinds of change that watch knows.
var sights = map[string]sight{
	// A file that was not there when it was looked up first.
	"appear": func(name string) (func() (bool, error), func() error, error) {
		look := func() (bool, error) {
			_, err := os.Lstat(name)
			if errors.Is(err, fs.ErrNotExist) {
				return false, nil
			}
			return err == nil, err
		}
		return look, func() error { return nil }, nil
	},
	// A file of which a longer one was made, or that another was renamed over.
	"reopen": func(name string) (func() (bool, error), func() error, error) {
		look := func() (bool, error) {
			data, err := os.ReadFile(name)
			return bytes.Contains(data, []byte(changed)), err
		}
		return look, func() error { return nil }, nil
	},
	// A file that is open all the time, as `tail -f` has it.
	"follow": func(name string) (func() (bool, error), func() error, error) {
		f, err := os.Open(name)
		if err != nil {
			return nil, nil, err
		}
		var all []byte
		look := func() (bool, error) {
			data, err := io.ReadAll(f)
			all = append(all, data...)
			return bytes.Contains(all, []byte(changed)), err
		}
		return look, f.Close, nil
	},
}

// watch prints "ready" when it has looked once, then "seen" or "unseen".
func watch(s sight, name string, stdout io.Writer) error {
	look, end, err := s(name)
	if err != nil {
		return err
	}
	if seen, err := look(); err != nil || seen {
		return errors.Join(err, fmt.Errorf("look at %s: seen before the change: %v", name, seen), end())
	}
	fmt.Fprintln(stdout, "ready")
	for began := time.Now(); time.Since(began) < patience; time.Sleep(interval) {
		seen, err := look()
		if err != nil {
			return errors.Join(err, end())
		}
		if seen {
			fmt.Fprintln(stdout, "seen")
			return end()
		}
	}
	fmt.Fprintln(stdout, "unseen")
	return end()
}

// hold writes to a new file, prints "ready", and closes it at the end of stdin.
func hold(name string, stdin io.Reader, stdout io.Writer) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(changed); err != nil {
		return errors.Join(err, f.Close())
	}
	fmt.Fprintln(stdout, "ready")
	_, err = io.Copy(io.Discard, stdin)
	return errors.Join(err, f.Close())
}
