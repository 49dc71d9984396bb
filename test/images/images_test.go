package images

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestWriteArchiveIsReproducibleAndHoldsEveryBlob(t *testing.T) {
	files := []File{{Name: "bin/", Mode: 0o755}, {Name: "bin/a", Data: []byte("x"), Mode: 0o755}, {Name: "bin/b", Link: "a", Mode: 0o777}}
	var first, second bytes.Buffer
	for _, w := range []io.Writer{&first, &second} {
		if err := WriteArchive(w, "example.test/a:latest", files); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two archives of the same files differ")
	}
	blobs := map[string]bool{}
	var index struct {
		Manifests []struct {
			Digest      string            `json:"digest"`
			Annotations map[string]string `json:"annotations"`
		} `json:"manifests"`
	}
	for r := tar.NewReader(&first); ; {
		header, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Dir(header.Name) == "blobs/sha256" && header.Typeflag == tar.TypeReg {
			if got := sum(data); got != filepath.Base(header.Name) {
				t.Errorf("blob %s has digest %s", header.Name, got)
			}
			blobs["sha256:"+filepath.Base(header.Name)] = true
		}
		if header.Name == "index.json" {
			if err := json.Unmarshal(data, &index); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(blobs) != 3 || len(index.Manifests) != 1 || !blobs[index.Manifests[0].Digest] {
		t.Errorf("blobs %v, index %+v: want layer, config and the manifest that the index names", blobs, index)
	}
}

func TestUnpack(t *testing.T) {
	dir := t.TempDir()
	err := Unpack(dir, []File{{Name: "bin/", Mode: 0o755}, {Name: "bin/a", Data: []byte("x"), Mode: 0o755}, {Name: "bin/b", Link: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "bin/b")); err != nil || string(data) != "x" {
		t.Errorf("read through the link: %q, %v", data, err)
	}
}
