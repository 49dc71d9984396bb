// Package refusal is the agent's own word where it refuses a call: a text that
// the guest wrote, made fit to be repeated.
package refusal

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// maxText bounds what is repeated of what the guest wrote, in bytes.
const maxText = 2048

// An Error says what was being done and why it failed, in one printable line of
// bounded length, whatever the guest wrote. It wraps the error it was made of.
type Error struct {
	text  string
	cause error
}

// Error implements error.
func (e *Error) Error() string { return e.text }

// Unwrap returns the error as it came, for its class.
func (e *Error) Unwrap() error { return e.cause }

// New returns the Error for what came of a call.
func New(err error) *Error {
	text := err.Error()
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "..."
	}
	return &Error{text: strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text), cause: err}
}

// During says what failed, unless the agent has said so. It is nil for a nil err.
func During(err error, format string, args ...any) error {
	var said *Error
	if err == nil || errors.As(err, &said) {
		return err
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
}
