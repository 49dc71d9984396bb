package bootstrap

import (
	"bytes"
	"fmt"
	"path"
	"path/filepath"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// optionsType is what ctr's --runtime-config-path and the options of a CRI
	// runtime handler become.
	optionsType = "runtimeoptions.v1.Options"
	// runcOptionsType is what clients send that take every runtime for runc.
	// Its fields mean nothing here.
	runcOptionsType = "containerd.runc.v1.Options"
)

// isOptions tells whether a is a runtime's options.
func isOptions(a *anypb.Any) bool {
	name := path.Base(a.GetTypeUrl())
	return name == optionsType || name == runcOptionsType
}

// readOptions takes the configuration file's name out of the options.
func (r *request) readOptions() error {
	if path.Base(r.options.GetTypeUrl()) != optionsType {
		return nil
	}
	var o runtimeoptions.Options
	if err := proto.Unmarshal(r.options.Value, &o); err != nil {
		return fmt.Errorf("decode runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	switch {
	case o.ConfigPath == "" && len(bytes.TrimSpace(o.ConfigBody)) > 0:
		return fmt.Errorf("runtime options hold a configuration: put it into a file and name that by ConfigPath: %w", errdefs.ErrInvalidArgument)
	case o.ConfigPath != "" && !filepath.IsAbs(o.ConfigPath):
		return fmt.Errorf("runtime options: ConfigPath %q is not an absolute path: %w", o.ConfigPath, errdefs.ErrInvalidArgument)
	}
	r.config = o.ConfigPath
	return nil
}
