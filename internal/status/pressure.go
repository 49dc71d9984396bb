package status

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/husk-containers/husk/internal/process"
)

// A Pressure is the share of time in which tasks waited for a resource (the kernel's
// pressure stall information), in percent of the last 10 s and of the last minute.
type Pressure struct {
	Resource string `json:"resource"` // cpu, memory or io
	// Of is "pod" where the pod's cgroup has it, or else "host".
	Of string `json:"of"`
	// Some is when a task waited, Full when all did.
	Some10 float64 `json:"some_avg10"`
	Some60 float64 `json:"some_avg60"`
	Full10 float64 `json:"full_avg10"`
	Full60 float64 `json:"full_avg60"`
}

// pressure reads those of the pod's cgroup of version 2, or else of the host. A host
// whose kernel has none has none to show.
func (h Host) pressure(cgroups []process.Cgroup) ([]Pressure, error) {
	var pressures []Pressure
	for _, resource := range []string{"cpu", "memory", "io"} {
		for _, file := range h.pressureFiles(cgroups, resource) {
			raw, err := os.ReadFile(file.path)
			// Where it was switched off at boot the file is there, and cannot be read.
			if err != nil {
				continue
			}
			p, err := parsePressure(string(raw))
			if err != nil {
				return nil, fmt.Errorf("parse %s: %w", file.path, err)
			}
			p.Resource, p.Of = resource, file.of
			pressures = append(pressures, p)
			break
		}
	}
	return pressures, nil
}

type pressureFile struct{ of, path string }

// pressureFiles are those to try. The root cgroup's is the host's.
func (h Host) pressureFiles(cgroups []process.Cgroup, resource string) []pressureFile {
	var files []pressureFile
	for _, c := range cgroups {
		if c.Controllers != "" || c.Path == "/" {
			continue
		}
		for _, mount := range []string{"fs/cgroup", "fs/cgroup/unified"} {
			if _, err := os.Stat(filepath.Join(h.Sys, mount, "cgroup.controllers")); !errors.Is(err, fs.ErrNotExist) {
				files = append(files, pressureFile{"pod", filepath.Join(h.Sys, mount, c.Path, resource+".pressure")})
			}
		}
	}
	return append(files, pressureFile{"host", filepath.Join(h.Proc, "pressure", resource)})
}

// parsePressure reads lines of "some avg10=0.12 avg60=0.05 avg300=0.01 total=1234". Older
// kernels have no line "full" for the CPU.
func parsePressure(raw string) (Pressure, error) {
	var p Pressure
	for line := range strings.Lines(raw) {
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		for field := range strings.FieldsSeq(rest) {
			key, value, _ := strings.Cut(field, "=")
			to := map[string]*float64{"some avg10": &p.Some10, "some avg60": &p.Some60, "full avg10": &p.Full10, "full avg60": &p.Full60}[kind+" "+key]
			if to == nil {
				continue
			}
			var err error
			if *to, err = strconv.ParseFloat(value, 64); err != nil {
				return Pressure{}, err
			}
		}
	}
	return p, nil
}
