package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// updateLimit is how soon a watcher in a container knows of an update.
const updateLimit = time.Second

// TestConfiguration is of what a kubelet projects: configMaps, secrets, and projected
// volumes such as those of service accounts.
func TestConfiguration(t *testing.T) {
	each(t, setup{}, func(e *env) {
		k := e.kubelet("config")
		maps := k.configMap("map", payload{"plain": {"text\n", 0o644}, "secretive": {"0400\n", 0o400}, "run": {"#!/bin/sh\necho ran\n", 0o755}}, "nested")
		secret := k.secret("secret", "secret", payload{"password": {"hush", 0o600}})
		token := k.secret("projected", "token", payload{"token": {"eyJ", 0o640}, "dir/sub/labels": {"a=b\n", 0o644}, "empty": {"", 0o644}})
		k.must(os.Chown(filepath.Join(token, "..data", "token"), 1234, 2345))
		p := e.run("config")
		mounts := with(ro(maps, "/map"), ro(secret, "/map/nested"), ro(token, "/token"))
		a := p.start("a", idle, e.probe(), mounts)
		b := p.start("b", idle, e.probe(), mounts)
		host, guest := []string{secret, token}, []string{"/map/nested", "/token"}
		for _, c := range []*container{a, b} {
			c.wantTree(host, guest)
			c.want("cat /map/plain /token/dir/sub/labels; /map/run; ls -A /map/nested/..data", "text\na=b\nran\npassword")
		}
		if r := a.exec("echo > /map/plain; echo > /map/new; rm /token/token"); r.code == 0 || strings.Count(r.stderr, "Read-only") != 3 {
			e.Errorf("write to configuration: %v", r)
		}

		// One key goes and one comes; what is mounted inside stays.
		k.write(maps, plain(map[string]string{"plain": "changed\n", "added": "new\n"}))
		k.write(secret, payload{"other": {"hush hush", 0o600}})
		k.write(token, payload{"token": {"eyJ2", 0o600}, "dir/sub2/labels": {"c=d\n", 0o644}})
		for _, c := range []*container{a, b} {
			c.eventuallyTree(host, guest)
			c.soon("cat /map/plain /map/added; ls -d /map/* | tr '\\n' ' '", "changed\nnew\n/map/added /map/nested /map/plain")
		}
		a.stop()
		a.remove()
		k.write(secret, payload{"password": {"third", 0o600}})
		b.eventuallyTree(host, guest)
		b.want("cat /map/nested/password", "third")
	})
}

// eventuallyTree is wantTree for what takes a moment.
func (c *container) eventuallyTree(host, guest []string) {
	c.e.Helper()
	c.e.within(10*time.Second, "the container sees what the host has", func(context.Context) error {
		if want, r := c.e.tree(host...), c.exec("/probe tree "+strings.Join(guest, " ")); strings.TrimSpace(r.stdout) != want || r.code != 0 {
			return fmt.Errorf("in the container:\n%s\n%s\non the host:\n%s", r.stdout, r.stderr, want)
		}
		return nil
	})
}

// version is a payload all of whose files tell of one version, on many lines.
func version(n, lines int) payload {
	text := strings.Repeat(fmt.Sprintf("v%d\n", n), lines)
	return plain(map[string]string{"a": text, "b": text, "dir/c": text})
}

// TestUpdatesAreSeenAtOnceAndWhole has one container watch and another read all the
// time what a kubelet replaces.
func TestUpdatesAreSeenAtOnceAndWhole(t *testing.T) {
	const lines, rounds = 4096, 20
	each(t, setup{}, func(e *env) {
		k := e.kubelet("updates")
		host := []string{k.configMap("map", version(0, lines)), k.secret("secret", "secret", version(0, lines)), k.secret("projected", "token", version(0, lines))}
		guest := []string{"/map", "/secret", "/token"}
		p := e.run("updates")
		mounts := with(ro(host[0], guest[0]), ro(host[1], guest[1]), ro(host[2], guest[2]))
		reader := p.start("reader", "exec /probe read a b dir/c -- "+strings.Join(guest, " "), e.probe(), mounts)
		reader.waitOutput("reading\n")
		watcher := p.start("watcher", "exec /probe watch a "+strings.Join(guest, " "), e.probe(), mounts)
		watcher.waitOutput("watching\n")

		var took []time.Duration
		for n := 1; n <= 5; n++ {
			for i, dir := range host {
				began := time.Now()
				k.write(dir, version(n, lines))
				took = append(took, watcher.printed(fmt.Sprintf("%s v%d\n", guest[i], n)).Sub(began))
			}
		}
		slices.Sort(took)
		e.Logf("updates were seen after %v", took)
		// The others may have met a busy machine.
		if median := took[len(took)/2]; median > updateLimit*patience() {
			e.Errorf("half of the updates took more than %v, want at most %v", median, updateLimit)
		}

		for n := 6; n <= rounds; n++ { // faster than anybody may be able to follow
			for _, dir := range host {
				k.write(dir, version(n, lines))
			}
		}
		for _, dir := range guest {
			watcher.waitOutput(fmt.Sprintf("%s v%d\n", dir, rounds))
			reader.eventually(fmt.Sprintf("head -n 1 %s/dir/c", dir), fmt.Sprint("v", rounds))
		}
		reader.terminate()
		got := reader.output("stdout")
		for _, dir := range guest {
			if line := fmt.Sprintf("last %s v%d\n", dir, rounds); !strings.Contains(got, line) {
				e.Errorf("the reader says no %q", line)
			}
		}
		if strings.Contains(got, "wrong") {
			e.Errorf("the reader saw what was not whole: %.2000s", got)
		}
	})
}

// terminate ends a container by its signal.
func (c *container) terminate() {
	c.e.Helper()
	ctx, cancel := c.e.call()
	defer cancel()
	if _, err := c.e.cri.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.id, Timeout: 60}); err != nil {
		c.e.Fatalf("stop container: %v", err)
	}
	if s := c.exited(); s.ExitCode != 0 {
		c.e.Errorf("exit code %d", s.ExitCode)
	}
}

// eventually is want for what takes a moment, and is an error until then.
func (c *container) eventually(script, want string) {
	c.e.Helper()
	c.e.within(30*time.Second, script, func(context.Context) error {
		if r := c.exec(script); r.code != 0 || strings.TrimSpace(r.stdout) != want {
			return fmt.Errorf("%v, want %q", r, want)
		}
		return nil
	})
}

// printed waits for a line on standard output, and returns when the log got it.
func (c *container) printed(line string) time.Time {
	c.e.Helper()
	var at time.Time
	c.e.within(30*time.Second, "the container prints "+line, func(context.Context) error {
		data, err := os.ReadFile(c.log)
		if err != nil {
			return err
		}
		before, _, found := strings.Cut(string(data), " stdout F "+line)
		if !found {
			return fmt.Errorf("no %q in %q", line, data)
		}
		at, err = time.Parse(time.RFC3339Nano, before[strings.LastIndexByte(before, '\n')+1:])
		return err
	})
	return at
}

// TestConfigurationOfAnyNumberAndSize has more of it than others can.
func TestConfigurationOfAnyNumberAndSize(t *testing.T) {
	const volumes, large = 50, 5 << 20
	each(t, setup{}, func(e *env) {
		k := e.kubelet("many")
		var host, guest []string
		var mounts []*runtime.Mount
		for i := range volumes {
			files := plain(map[string]string{"value": fmt.Sprint("of ", i), "large": ""})
			var dir string
			if i%2 == 0 {
				dir = k.configMap(fmt.Sprint("map", i), files)
			} else {
				dir = k.secret("secret", fmt.Sprint("secret", i), files)
			}
			host, guest = append(host, dir), append(guest, fmt.Sprint("/volumes/", i))
			mounts = append(mounts, ro(dir, guest[i]))
		}
		p := e.run("many")
		grow := func(i int, text string) {
			k.write(host[i], plain(map[string]string{"value": fmt.Sprint("of ", i), "large": strings.Repeat(text, large/len(text))}))
		}
		grow(0, "large when it came\n")
		a := p.start("a", idle, e.probe(), with(mounts...))
		a.wantTree(host, guest)
		for i := range host {
			k.write(host[i], plain(map[string]string{"value": fmt.Sprint("new of ", i)}))
		}
		grow(1, "large later\n")
		a.eventuallyTree(host, guest)
	})
}
