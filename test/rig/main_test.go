package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	t.Setenv("PATH", "/bin")
	t.Setenv("HOME", "/root")
	cfg, timeout, err := parse(strings.Fields("-cpus 2 -nodes 2 -memory 1024 -timeout 3s -dir /work -out /results -env A=1 -env B=x=y -- sh -c true"))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.CPUs != 2 || cfg.Nodes != 2 || cfg.MemoryMiB != 1024 || timeout != 3*time.Second || cfg.Job.Dir != "/work" || cfg.OutDir != "/results" {
		t.Errorf("parsed %+v, timeout %v", cfg, timeout)
	}
	if want := []string{"sh", "-c", "true"}; !slices.Equal(cfg.Job.Args, want) {
		t.Errorf("command %q, want %q", cfg.Job.Args, want)
	}
	if want := []string{"PATH=/bin", "HOME=/root", "HUSK_RIG=1", "A=1", "B=x=y"}; !slices.Equal(cfg.Job.Env, want) {
		t.Errorf("environment %q, want %q", cfg.Job.Env, want)
	}
}

func TestParseDefaults(t *testing.T) {
	cfg, timeout, err := parse([]string{"true"})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.CPUs != 2 || cfg.Nodes != 1 || cfg.MemoryMiB != 4096 || timeout != 20*time.Minute || cfg.Job.Dir != dir || cfg.OutDir != "" {
		t.Errorf("parsed %+v, timeout %v", cfg, timeout)
	}
}

func TestParseRejects(t *testing.T) {
	for args, want := range map[string]string{
		"":                     "no command given",
		"-cpus 0 -- true":      "-cpus 0: at least 1",
		"-nodes 3 -- true":     "-nodes 3: from 1 to as many as CPUs, 2",
		"-nodes 0 -- true":     "-nodes 0: from 1",
		"-memory 100 -- true":  "-memory 100: at least 512 MiB",
		"-env NOVALUE -- true": "KEY=VALUE",
		"-env =x -- true":      "KEY=VALUE",
	} {
		if _, _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", args, err, want)
		}
	}
}
