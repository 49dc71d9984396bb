// Command gendoc writes docs/configuration.md from configuration.toml.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/husk-containers/husk"
)

func main() {
	out := flag.String("o", "/dev/stdout", "the `file` to write")
	flag.Parse()
	page, err := render(husk.Configuration)
	if err == nil {
		err = os.WriteFile(*out, []byte(page), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gendoc:", err)
		os.Exit(1)
	}
}
