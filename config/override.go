package config

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// AnnotationPrefix begins the names of the annotations that are Husk's.
const AnnotationPrefix = "io.husk."

// An override is a key that an annotation may set, where the configuration allows it.
type override struct {
	key string // section.key
	// set takes the annotation's value. Its error says what is wanted instead, or is
	// errValue for what the key's rule wants.
	set func(c *Config, value string) error
}

var errValue = errors.New("not of the key's type")

// overrides are all keys that annotations can set. A pod has no say in which files and
// programs of the host are used, as whom they run, or what it is allowed.
func overrides() []override {
	var (
		maxVCPUs     = func(c *Config) *int { return &c.Hypervisor.MaxVCPUs }
		maxMemoryMiB = func(c *Config) *int { return &c.Hypervisor.MaxMemoryMiB }
	)
	return []override{
		// The maxima come first: what they bound is compared with them.
		{"hypervisor.max_vcpus", atMost("hypervisor.max_vcpus", maxVCPUs, maxVCPUs)},
		{"hypervisor.max_memory_mib", atMost("hypervisor.max_memory_mib", maxMemoryMiB, maxMemoryMiB)},
		{"hypervisor.default_vcpus", atMost("hypervisor.max_vcpus", maxVCPUs,
			func(c *Config) *int { return &c.Hypervisor.DefaultVCPUs })},
		{"hypervisor.default_memory_mib", atMost("hypervisor.max_memory_mib", maxMemoryMiB,
			func(c *Config) *int { return &c.Hypervisor.DefaultMemoryMiB })},
		{"hypervisor.free_page_reporting", parsed(parseBool, func(c *Config) *bool { return &c.Hypervisor.FreePageReporting })},
		{"hypervisor.vcpu_pinning", parsed(parseBool, func(c *Config) *bool { return &c.Hypervisor.VCPUPinning })},
		{"hypervisor.virtiofsd_cache", func(c *Config, value string) error {
			c.Hypervisor.VirtiofsdCache = VirtiofsdCache(value)
			return nil
		}},
		{"hypervisor.virtiofsd_threads", parsed(strconv.Atoi, func(c *Config) *int { return &c.Hypervisor.VirtiofsdThreads })},
		{"guest.kernel_params", func(c *Config, value string) error {
			c.Guest.KernelParams = strings.TrimSpace(c.Guest.KernelParams + " " + value)
			return nil
		}},
		{"runtime.boot_timeout", func(c *Config, value string) error {
			if c.Runtime.BootTimeout.UnmarshalText([]byte(value)) != nil {
				return errValue
			}
			return nil
		}},
	}
}

// annotation is the name of the one that sets the key.
func (o override) annotation() string {
	_, name, _ := strings.Cut(o.key, ".")
	return AnnotationPrefix + name
}

// parseBool takes the words of TOML alone.
func parseBool(s string) (bool, error) {
	if s != "true" && s != "false" {
		return false, errValue
	}
	return s == "true", nil
}

func parsed[T any](parse func(string) (T, error), get func(*Config) *T) func(*Config, string) error {
	return func(c *Config, value string) error {
		v, err := parse(value)
		if err != nil {
			return errValue
		}
		*get(c) = v
		return nil
	}
}

// atMost sets a number that a maximum bounds, which may be itself and of which 0 is
// none.
func atMost(key string, bound, get func(*Config) *int) func(*Config, string) error {
	return func(c *Config, value string) error {
		most, own := *bound(c), bound(c) == get(c)
		if err := parsed(strconv.Atoi, get)(c, value); err != nil {
			return err
		}
		if n := *get(c); most > 0 && (n > most || own && n == 0) {
			return fmt.Errorf("at most %d, for %s bounds it", most, key)
		}
		return nil
	}
}

// Override returns c as a pod's annotations change it. Those that do not begin with
// AnnotationPrefix say nothing. The error names, in one line, every other one that
// runtime.allowed_annotations does not have, that is not known, or whose value is not
// allowed, each with the remedy. It is PermissionDenied if there are only such as are
// not allowed, and else InvalidArgument.
func (c Config) Override(annotations map[string]string) (Config, error) {
	out := c
	var class error = errdefs.ErrPermissionDenied
	var problems []string
	invalid := func(format string, args ...any) {
		problems, class = append(problems, fmt.Sprintf(format, args...)), errdefs.ErrInvalidArgument
	}
	var taken []override
	for _, o := range overrides() {
		name := o.annotation()
		value, given := annotations[name]
		switch {
		case !given:
			continue
		case !c.Runtime.allows(name):
			problems = append(problems, fmt.Sprintf("%s: this node does not allow it; leave it out, or add it to runtime.allowed_annotations of the node's configuration", name))
			continue
		}
		next := out
		switch err := o.set(&next, value); {
		case err == nil:
			out, taken = next, append(taken, o)
		case errors.Is(err, errValue):
			invalid("%s = %q: want %s", name, value, ruleOf(o.key).want)
		default:
			invalid("%s = %q: want %s", name, value, err)
		}
	}
	for _, o := range taken {
		if r := ruleOf(o.key); r.problem(&out) != "" {
			invalid("%s = %q: want %s", o.annotation(), annotations[o.annotation()], r.want)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if strings.HasPrefix(name, AnnotationPrefix) && !isOverride(name) {
			invalid("%s: there is no such annotation; leave it out, or write one of %s", name, strings.Join(annotationNames(), ", "))
		}
	}
	if len(problems) > 0 {
		return Config{}, fmt.Errorf("annotations: %s: %w", strings.Join(problems, "; "), class)
	}
	return out, nil
}

// allows tells whether a pod may have an annotation.
func (r Runtime) allows(name string) bool {
	return slices.ContainsFunc(r.AllowedAnnotations, func(pattern string) bool {
		ok, err := path.Match(pattern, name)
		return ok && err == nil
	})
}

func annotationNames() []string {
	var names []string
	for _, o := range overrides() {
		names = append(names, o.annotation())
	}
	return names
}

func isOverride(name string) bool { return slices.Contains(annotationNames(), name) }

// isNoAnnotation tells of a pattern that no annotation which can set a key matches.
func isNoAnnotation(pattern string) bool {
	return !slices.ContainsFunc(annotationNames(), Runtime{AllowedAnnotations: []string{pattern}}.allows)
}

func ruleOf(key string) rule {
	all := rules()
	return all[slices.IndexFunc(all, func(r rule) bool { return r.key == key })]
}
