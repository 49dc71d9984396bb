package boot

import (
	"fmt"
	"log/slog"
	"strings"
)

// Params are the agent's own parameters on the kernel's command line.
type Params struct {
	// Channel is husk.channel: the carrier to the host, as agent/channel
	// takes it.
	Channel string
	// LogLevel is husk.log.
	LogLevel slog.Level
}

// ParseParams picks the agent's parameters out of a kernel command line. Of one
// given twice the last counts, as for the kernel. Words that are not the
// agent's are not looked at, but an unknown husk.* is an error.
func ParseParams(cmdline string) (Params, error) {
	p := Params{LogLevel: slog.LevelWarn}
	for word := range strings.FieldsSeq(cmdline) {
		key, value, _ := strings.Cut(word, "=")
		if !strings.HasPrefix(key, "husk.") {
			continue
		}
		switch key {
		case "husk.channel":
			p.Channel = value
		case "husk.log":
			switch value {
			case "debug", "info", "warn":
				p.LogLevel.UnmarshalText([]byte(value)) //nolint:errcheck // one of the three
			default:
				return p, fmt.Errorf("kernel parameter husk.log=%s: want debug, info or warn", value)
			}
		default:
			return p, fmt.Errorf("kernel parameter %s: not known to this agent", key)
		}
	}
	if p.Channel == "" {
		return p, fmt.Errorf("kernel parameter husk.channel: missing")
	}
	return p, nil
}
