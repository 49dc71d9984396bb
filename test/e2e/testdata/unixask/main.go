// Command unixask sends its second argument to the unix socket that is the first,
// half-closes, and prints what comes.
package main

import (
	"io"
	"log"
	"net"
	"os"
)

func main() {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: os.Args[1], Net: "unix"})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := io.WriteString(conn, os.Args[2]); err != nil {
		log.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		log.Fatal(err)
	}
	if _, err := io.Copy(os.Stdout, conn); err != nil {
		log.Fatal(err)
	}
}
