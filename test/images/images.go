// Package images assembles container images from what the machine holds, so
// that no test needs a registry.
package images

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// Busybox is the name under which WriteBusybox's image is imported.
const Busybox = "example.test/busybox:latest"

// Pause is the name under which WritePause's image is imported.
const Pause = "example.test/pause:latest"

// BusyboxPath is the static busybox of Debian's package busybox-static.
const BusyboxPath = "/bin/busybox"

// A File is one entry of an image's root: a directory where Link and Data are
// empty and the name ends in a slash, a symbolic link where Link is set.
type File struct {
	Name string
	Link string
	Data []byte
	Mode int64
}

// BusyboxRoot lists a root file system of one static busybox: a link for each
// of its applets, three users (root, daemon, nobody), and the directories that
// an OCI runtime mounts on.
func BusyboxRoot() ([]File, error) {
	busybox, err := os.ReadFile(BusyboxPath)
	if err != nil {
		return nil, fmt.Errorf("read busybox (install the package busybox-static): %w", err)
	}
	list, err := exec.Command(BusyboxPath, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets of %s: %w", BusyboxPath, err)
	}
	var files []File
	for _, dir := range []string{"bin/", "dev/", "etc/", "proc/", "root/", "run/", "sys/", "var/"} {
		files = append(files, File{Name: dir, Mode: 0o755})
	}
	files = append(files,
		File{Name: "tmp/", Mode: 0o1777},
		File{Name: "bin/busybox", Data: busybox, Mode: 0o755},
		File{Name: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\n" +
			"daemon:x:1:1:daemon:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")},
		File{Name: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\ndaemon:x:1:\n" +
			"audio:x:29:daemon\nnogroup:x:65534:\n")},
		File{Name: "etc/not-executable", Mode: 0o644, Data: []byte("#!/bin/sh\n")},
	)
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, Link: "busybox", Mode: 0o777})
		}
	}
	return files, nil
}

// WriteBusybox writes an OCI archive of BusyboxRoot, named Busybox. The same
// busybox gives the same bytes.
func WriteBusybox(w io.Writer) error {
	files, err := BusyboxRoot()
	if err != nil {
		return err
	}
	return WriteArchive(w, Busybox, files)
}

// WritePause writes an OCI archive of BusyboxRoot, named Pause, whose command
// is what a pod's sandbox container has to do: reap, and end when told.
func WritePause(w io.Writer) error {
	files, err := BusyboxRoot()
	if err != nil {
		return err
	}
	return writeImage(w, Pause, files, []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 86400 & wait $!; done"})
}

// WriteArchive writes an OCI image layout, as a tar, that holds one image of
// one layer for linux/amd64. Its command is sh.
func WriteArchive(w io.Writer, name string, files []File) error {
	return writeImage(w, name, files, []string{"sh"})
}

func writeImage(w io.Writer, name string, files []File, command []string) error {
	var layer bytes.Buffer
	if err := writeTar(&layer, files); err != nil {
		return fmt.Errorf("assemble layer: %w", err)
	}
	blobs := []File{{Name: "blobs/sha256/", Mode: 0o755}}
	add := func(mediaType string, data []byte) map[string]any {
		digest := sum(data)
		blobs = append(blobs, File{Name: "blobs/sha256/" + digest, Data: data, Mode: 0o644})
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + digest, "size": len(data)}
	}
	addJSON := func(mediaType string, v any) (map[string]any, error) {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", mediaType, err)
		}
		return add(mediaType, data), nil
	}
	layerDesc := add("application/vnd.oci.image.layer.v1.tar", layer.Bytes())
	configDesc, err := addJSON("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": "amd64",
		"os":           "linux",
		"config":       map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": command},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []any{layerDesc["digest"]}},
	})
	if err != nil {
		return err
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	manifest, err := addJSON(manifestType, map[string]any{
		"schemaVersion": 2,
		"mediaType":     manifestType,
		"config":        configDesc,
		"layers":        []any{layerDesc},
	})
	if err != nil {
		return err
	}
	manifest["annotations"] = map[string]string{"io.containerd.image.name": name}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})
	if err != nil {
		return fmt.Errorf("encode index: %w", err)
	}
	return writeTar(w, append(blobs,
		File{Name: "oci-layout", Data: []byte(`{"imageLayoutVersion":"1.0.0"}`), Mode: 0o644},
		File{Name: "index.json", Data: index, Mode: 0o644}))
}

// Unpack writes files into dir, which exists and is empty.
func Unpack(dir string, files []File) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open root: %w", err)
	}
	defer root.Close()
	for _, f := range files {
		name := strings.TrimSuffix(f.Name, "/")
		switch {
		case f.Link != "":
			err = root.Symlink(f.Link, name)
		case name != f.Name:
			err = root.Mkdir(name, 0o755)
		default:
			err = root.WriteFile(name, f.Data, os.FileMode(f.Mode))
		}
		if err != nil {
			return fmt.Errorf("unpack %s: %w", f.Name, err)
		}
	}
	return nil
}

func writeTar(w io.Writer, files []File) error {
	tw := tar.NewWriter(w)
	for _, f := range files {
		header := tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Data)), Linkname: f.Link, Typeflag: tar.TypeReg}
		switch {
		case f.Link != "":
			header.Typeflag = tar.TypeSymlink
		case strings.HasSuffix(f.Name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := tw.WriteHeader(&header); err != nil {
			return fmt.Errorf("write %s: %w", f.Name, err)
		}
		if _, err := tw.Write(f.Data); err != nil {
			return fmt.Errorf("write %s: %w", f.Name, err)
		}
	}
	return tw.Close()
}

func sum(data []byte) string {
	digest := sha256.Sum256(data)
	return hex.EncodeToString(digest[:])
}
