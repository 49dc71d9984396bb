package qmp

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
)

// maxText bounds what of QEMU's own words goes into an error, in bytes.
const maxText = 1024

// An Event is what QEMU tells unasked, such as "SHUTDOWN".
type Event struct {
	// Name as in QEMU's QMP reference.
	Name string
	// Data is the event's own JSON object; nil where it has none.
	Data json.RawMessage
	// Time by QEMU's clock.
	Time time.Time
	// Lost counts the events dropped on this connection before this one
	// because nobody took them from Events.
	Lost uint64
}

// An Error is QEMU's answer to a command that it did not carry out. One of class
// DeviceNotFound is an errdefs.ErrNotFound, and CommandNotFound an
// errdefs.ErrNotImplemented.
type Error struct {
	// Command that failed.
	Command string
	// Class, such as "GenericError" or "DeviceNotFound".
	Class string
	// Desc is QEMU's text for humans.
	Desc string
}

func (e *Error) Error() string {
	if e.Class == "GenericError" {
		return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc)
	}
	return fmt.Sprintf("qmp %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// Is maps the class of the error to one of package errdefs.
func (e *Error) Is(target error) bool {
	switch e.Class {
	case "DeviceNotFound":
		return target == errdefs.ErrNotFound
	case "CommandNotFound":
		return target == errdefs.ErrNotImplemented
	}
	return false
}

// A greeting is QEMU's first line.
type greeting struct {
	QMP *struct {
		Version struct {
			QEMU struct {
				Major, Minor, Micro int
			} `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
}

// A message is any later line of QEMU's: an event, or the reply to a command.
type message struct {
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// A command is a line to QEMU.
type command struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

// clean bounds QEMU's text and takes control characters out of it.
func clean(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "..."
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(s, ""))
}
