// Package husk holds the annotated default configuration.
package husk

import _ "embed"

// Configuration is configuration.toml: every key with its meaning and default.
//
//go:embed configuration.toml
var Configuration string
