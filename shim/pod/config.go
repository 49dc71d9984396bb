package pod

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"
)

// A Config is what CRI says of a pod as a whole, as far as it matters to a VM. Its
// zero value says nothing.
type Config struct {
	// Hostname of the pod; empty: the host's.
	Hostname string
	// DNS is what /etc/resolv.conf of the pod holds; nil: what the host's does.
	DNS *DNS
	// CgroupParent is the host's cgroup that the pod is in; empty: CRI names none.
	CgroupParent string
	// Sysctls of the pod by name.
	Sysctls map[string]string
	// Annotations of the pod, whoever's.
	Annotations map[string]string
	// Resources of its containers together.
	Resources Resources
}

// DNS is the content of a resolv.conf.
type DNS struct {
	Servers, Searches, Options []string
}

// ResolvConf returns the text of the file.
func (d *DNS) ResolvConf() string {
	var b strings.Builder
	if len(d.Searches) > 0 {
		b.WriteString("search " + strings.Join(d.Searches, " ") + "\n")
	}
	for _, s := range d.Servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(d.Options) > 0 {
		b.WriteString("options " + strings.Join(d.Options, " ") + "\n")
	}
	return b.String()
}

// IsConfig tells whether a sandbox's options are CRI's PodSandboxConfig.
func IsConfig(options *anypb.Any) bool {
	return path.Base(options.GetTypeUrl()) == "runtime.v1.PodSandboxConfig"
}

// Fields of the messages of CRI's API v1.
const (
	configHostname    = 2
	configDNS         = 4
	configAnnotations = 7
	configLinux       = 8
	linuxCgroupParent = 1
	linuxSysctls      = 3
	linuxResources    = 5
	entryKey          = 1
	entryValue        = 2
	dnsServers        = 1
	dnsSearches       = 2
	dnsOptions        = 3
)

// Decode reads a PodSandboxConfig: the few fields that matter, so that CRI's API
// with all that it brings is no dependency. The error is InvalidArgument.
func Decode(raw []byte) (Config, error) {
	var c Config
	err := fields(raw, func(n protowire.Number, v []byte) error {
		switch n {
		case configHostname:
			c.Hostname = string(v)
		case configDNS:
			if c.DNS == nil {
				c.DNS = &DNS{}
			}
			return c.DNS.decode(v)
		case configAnnotations:
			return entry(&c.Annotations, v)
		case configLinux:
			return c.decodeLinux(v)
		}
		return nil
	})
	if err != nil {
		return Config{}, fmt.Errorf("decode the pod's configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

func (d *DNS) decode(raw []byte) error {
	return fields(raw, func(n protowire.Number, v []byte) error {
		switch n {
		case dnsServers:
			d.Servers = append(d.Servers, string(v))
		case dnsSearches:
			d.Searches = append(d.Searches, string(v))
		case dnsOptions:
			d.Options = append(d.Options, string(v))
		}
		return nil
	})
}

func (c *Config) decodeLinux(raw []byte) error {
	return fields(raw, func(n protowire.Number, v []byte) error {
		switch n {
		case linuxCgroupParent:
			c.CgroupParent = string(v)
		case linuxSysctls:
			return entry(&c.Sysctls, v)
		case linuxResources:
			return c.Resources.decode(v)
		}
		return nil
	})
}

// entry adds an entry of a map to it.
func entry(to *map[string]string, raw []byte) error {
	var key, value string
	err := fields(raw, func(n protowire.Number, v []byte) error {
		switch n {
		case entryKey:
			key = string(v)
		case entryValue:
			value = string(v)
		}
		return nil
	})
	if *to == nil {
		*to = map[string]string{}
	}
	(*to)[key] = value
	return err
}

// fields calls f with each length-delimited field of a message and skips others.
func fields(raw []byte, f func(protowire.Number, []byte) error) error {
	for len(raw) > 0 {
		number, kind, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, raw); n < 0 {
				return protowire.ParseError(n)
			}
			raw = raw[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(raw)
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		if err := f(number, v); err != nil {
			return err
		}
	}
	return nil
}
