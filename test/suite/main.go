// Command suite runs parts of Husk's tests and ends with what ran, what was
// skipped, and why:
//
//	suite [-v] part...
//
// It runs in the repository's root. The exit code is 0 where nothing failed.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	verbose := flag.Bool("v", false, "print the name of every test that passes, too")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "Usage: suite [-v] part...\nThe parts:")
		for _, p := range parts {
			fmt.Fprintf(flag.CommandLine.Output(), "  %-5s %s\n", p.name, p.about)
		}
	}
	flag.Parse()
	code, err := run(flag.Args(), *verbose)
	if err != nil {
		fmt.Fprintf(os.Stderr, "suite: %v\n", err)
	}
	os.Exit(code)
}

// run returns the exit code.
func run(names []string, verbose bool) (int, error) {
	var chosen []part
	for _, name := range names {
		p, ok := find(name)
		if !ok {
			return 2, fmt.Errorf("no part is named %q", name)
		}
		chosen = append(chosen, p)
	}
	if len(chosen) == 0 {
		flag.Usage()
		return 2, nil
	}
	// A signal of the terminal reaches the tests too, and the suite waits for
	// them to tear down. It is not ignored: children would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT)
	var reports []*report
	for _, p := range chosen {
		fmt.Printf("== %s: %s\n", p.name, p.about)
		r := newReport(p.name, os.Stdout, verbose)
		began := time.Now()
		if err := p.run(r); err != nil {
			r.fail(err)
		}
		r.took = time.Since(began)
		reports = append(reports, r)
	}
	return summarize(os.Stdout, reports), nil
}

// A part is a set of tests that runs as a whole.
type part struct {
	name, about string
	run         func(*report) error
}

var parts = []part{
	{"unit", "every package, with the race detector; no root, no QEMU", runUnit},
	{"e2e", "containers in VMs, by Debian's containerd and containerd 2.4", runE2E},
	{"cri", "pods in VMs, by a CRI client, on both", runCRI},
	{"smoke", "the main of e2e and cri, on containerd 2.4, in a few minutes", runSmoke},
	{"rig", "e2e and pods on KVM, vhost and cgroup v2, in a host in a box", runRig},
}

func find(name string) (part, bool) {
	for _, p := range parts {
		if p.name == name {
			return p, true
		}
	}
	return part{}, false
}

const e2ePackage = "./test/e2e"

func runUnit(r *report) error {
	return stream(r, exec.Command("go", "test", "-json", "-race", "-timeout", "15m", "./..."))
}

func runE2E(r *report) error {
	if os.Geteuid() != 0 {
		r.omit("needs root")
		return nil
	}
	return stream(r, exec.Command("go", "test", "-json", "-count=1", "-timeout", "50m", "-parallel", "2",
		e2ePackage, "-containerd=1.6,2.4"))
}

// runCRI tests a module of its own, which ./... leaves out.
func runCRI(r *report) error {
	if os.Geteuid() != 0 {
		r.omit("needs root")
		return nil
	}
	return errors.Join(
		stream(r, exec.Command("go", "test", "-C", "test/cri", "-json", "-count=1", "-timeout", "50m", "-parallel", "2",
			".", "-containerd=1.6,2.4", "-handler=husk,husk-shim")),
		// What takes minutes is run once.
		stream(r, exec.Command("go", "test", "-C", "test/cri", "-json", "-count=1", "-timeout", "20m",
			".", "-containerd=2.4", "-handler=husk", "-long", "-run", "^TestFiftyPods")),
	)
}

// runSmoke is for in between: what a change to any part of the path breaks first.
func runSmoke(r *report) error {
	if os.Geteuid() != 0 {
		r.omit("needs root")
		return nil
	}
	return errors.Join(
		stream(r, exec.Command("go", "test", "-json", "-count=1", "-timeout", "10m", "-parallel", "2", e2ePackage, "-containerd=2.4",
			"-run", "^(TestRunPrintsToBothStreams|TestExitCode|TestStdinReachesTheContainerAndEnds|TestExec|TestTTY|TestKillAll|TestShimKilled|TestHelperKilledWhileRunning|TestHostsNetwork)$")),
		stream(r, exec.Command("go", "test", "-C", "test/cri", "-json", "-count=1", "-timeout", "10m", "-parallel", "2", ".", "-containerd=2.4", "-handler=husk,husk-shim",
			"-run", "^(TestPodOfTwoContainersIsJoinedAndRemoved|TestPodsReachEachOther|TestPortForward|TestPodOfTheHostsNetwork|TestPIDNamespaceOfThePodIsShared|TestExecProbes|TestMemberThatCannotStartLeavesThePodRunning|TestDNSAndHostname)$")),
	)
}

// A box is a run of the rig, with the tests in it, where a start is several times
// slower: what needs KVM, vhost, vsock's loopback, cgroup v2 or memory nodes to be
// tested at all.
type box struct {
	args  []string
	tests []boxTest
}

// A boxTest are tests of a package, with the arguments of its test binary.
type boxTest struct{ pkg, run, args string }

// boxes have one CPU where nothing asks for more: with two, which are no faster, the
// rig's kernel hangs or dies now and then as a guest starts: QEMU's SVM has left it with
// the guest's GS base.
var boxes = []box{
	{[]string{"-cpus", "1"}, []boxTest{
		{"hypervisor/channel", "^TestConformance$/^vhost-vsock$|^TestVsock", ""},
		{"hypervisor/qemu", "^TestConformance$/^vhost-vsock$/^(Accept|the_monitor)|^TestNICConformance$/^vhost-vsock$/^interfaces|^TestVhostNICsPassFrames$", ""},
		// vCPUs are plugged by ACPI only under KVM; vhost works on while QEMU is stopped.
		{"hypervisor/qemu", "^TestSizeConformance$/^(a_paused_guest|vCPUs_come)", ""},
		{"virtcontainers/cgroup", "^Test", ""},
		{
			"test/e2e", "^(TestHostCgroup|TestHostCgroupOutOfMemory|TestProductionPath|TestRunPrintsToBothStreams|TestExitCode|TestStdinReachesTheContainerAndEnds|TestExec)$",
			"-containerd=1.6 -root=/out -scratch=/scratch",
		},
		{"test/cri", "^TestSmokeOfOnePod$", "-smoke -containerd=1.6,2.4 -handler=husk -root=/out -scratch=/scratch"},
		{"test/cri", "^TestSmokeOfPodsAndTheHostsNetwork$", "-smoke -containerd=2.4 -handler=husk-shim -root=/out -scratch=/scratch"},
		{"test/cri", "^TestSmokeOfResize$", "-smoke -containerd=2.4 -handler=husk -root=/out -scratch=/scratch"},
	}},
}

func runRig(r *report) error {
	if os.Geteuid() != 0 {
		r.omit("needs root")
		return nil
	}
	bin := filepath.Join("build", "bin")
	for out, pkg := range map[string]string{"rig": "./test/rig", "rig-init": "./test/rig/init"} {
		if err := build("build", "-o", filepath.Join(bin, out), pkg); err != nil {
			return err
		}
	}
	var errs []error
	for _, b := range boxes {
		errs = append(errs, b.run(r, bin))
	}
	return errors.Join(errs...)
}

// run runs the box's tests one after the other. The repository is at /out there,
// wherever it is here.
func (b box) run(r *report, bin string) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	script := "code=0\n"
	for _, t := range b.tests {
		binary := filepath.Join(bin, filepath.Base(t.pkg)+".test")
		// In the package's directory, for test/cri is a module of its own.
		if err := build("test", "-C", t.pkg, "-c", "-o", filepath.Join(root, binary), "."); err != nil {
			return err
		}
		script += fmt.Sprintf("cd /out/%s && /out/%s -test.v=test2json -test.timeout=18m -test.parallel=1 -test.run '%s' %s || code=1\n",
			t.pkg, binary, t.run, t.args)
	}
	args := append([]string{"-init", filepath.Join(bin, "rig-init"), "-out", root, "-dir", "/", "-timeout", "25m"}, b.args...)
	tests := exec.Command(filepath.Join(bin, "rig"), append(args, "--", "/bin/sh", "-c", script+"exit $code")...)
	convert := exec.Command("go", "tool", "test2json", "-p", "rig", "-t")
	pipe, err := tests.StdoutPipe()
	if err != nil {
		return err
	}
	tests.Stderr, convert.Stdin = os.Stderr, pipe
	if err := tests.Start(); err != nil {
		return fmt.Errorf("start the rig: %w", err)
	}
	err = stream(r, convert)
	return errors.Join(err, tests.Wait())
}

func build(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", args[0], err, out)
	}
	return nil
}

// stream runs a command that prints events of go test, and takes them in.
func stream(r *report, cmd *exec.Cmd) error {
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	readErr := r.read(bufio.NewReader(out))
	io.Copy(io.Discard, out) // so that the command ends whatever it printed
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && r.failed > 0 {
		err = nil // the report has the failures that the exit code stands for
	}
	return errors.Join(readErr, err)
}
