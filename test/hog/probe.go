package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const (
	// pace is how often a probe does its work.
	pace = 50 * time.Millisecond
	// window is how often it tells.
	window = time.Second
)

// probe does what a small service does: it wakes by the clock, takes memory, opens a
// file, writes, reads and removes it. It prints the worst of each window: from when
// it was to wake to when it has done.
func probe(dir string) error {
	name := filepath.Join(dir, fmt.Sprint("probe-", os.Getpid()))
	due := time.Now()
	told, worst := due, time.Duration(0)
	for {
		due = due.Add(pace)
		time.Sleep(time.Until(due))
		if err := work(name); err != nil {
			return err
		}
		now := time.Now()
		worst = max(worst, now.Sub(due))
		due = latest(due, now.Add(-pace)) // what it was late is counted once
		if now.Sub(told) >= window {
			fmt.Println("worst", worst.Microseconds(), "us")
			told, worst = now, 0
		}
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func work(name string) error {
	data := make([]byte, 64<<10)
	for i := range data {
		data[i] = byte(i)
	}
	if err := os.WriteFile(name, data, 0o600); err != nil {
		return err
	}
	if _, err := os.ReadFile(name); err != nil {
		return err
	}
	return os.Remove(name)
}
