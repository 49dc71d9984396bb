package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"testing"
)

func TestRelayCountsAndKeepsEveryByte(t *testing.T) {
	var port bytes.Buffer
	r, err := newRelay(&port)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{0, 255, '\n', '\r'}, 1<<20)
	if _, err := r.pipe.Write(want); err != nil {
		t.Fatal(err)
	}
	r.pipe.Close()
	n, err := r.wait()
	if n != int64(len(want)) || err != nil {
		t.Errorf("copied %d bytes, %v, want %d", n, err, len(want))
	}
	if !bytes.Equal(port.Bytes(), want) {
		t.Error("the bytes differ")
	}
}

func TestStartCode(t *testing.T) {
	for _, test := range []struct {
		err  error
		want int
	}{
		{&exec.Error{Name: "x", Err: exec.ErrNotFound}, 127},
		{&exec.Error{Name: "/x", Err: fs.ErrNotExist}, 127},
		{&exec.Error{Name: "/x", Err: fs.ErrPermission}, 126},
		{fmt.Errorf("chdir: %w", fs.ErrNotExist), 126},
		{errors.New("exec format error"), 126},
	} {
		if got := startCode(test.err); got != test.want {
			t.Errorf("%v: code %d, want %d", test.err, got, test.want)
		}
	}
}
