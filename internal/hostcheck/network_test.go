package hostcheck

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

func TestDeviceOpens(t *testing.T) {
	wantError(t, deviceOpens("/dev/null", "nothing"), "")
	wantError(t, deviceOpens("/nonexistent/dev", "load it"), "open /nonexistent/dev: no such file", "; load it")
}

func TestNFTablesUsable(t *testing.T) {
	err := NFTablesUsable()
	if errors.Is(err, unix.EPERM) {
		wantError(t, err, "make a network namespace: operation not permitted; run as root")
		t.Skip(err)
	}
	if err != nil { // a kernel without it: the remedy is all there is to test
		wantError(t, err, "nftables", "; load the kernel modules nf_tables")
		t.Skip(err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		if table.Name == "husk" {
			t.Error("the table is in the caller's namespace")
		}
	}
}

// Each call's namespace ends with it: no thread is left in one.
func TestNFTablesUsableLeavesNoNamespace(t *testing.T) {
	const calls = 10
	for range calls {
		if err := NFTablesUsable(); err != nil {
			t.Skip(err)
		}
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	var others []string
	for _, thread := range threads {
		ns, err := os.Readlink(fmt.Sprintf("/proc/self/task/%s/ns/net", thread.Name()))
		if err == nil && ns != own { // a thread that has just ended has none
			others = append(others, ns)
		}
	}
	// The last calls' threads may be on their way out.
	if len(others) >= calls {
		t.Errorf("threads in other namespaces: %s", strings.Join(others, " "))
	}
}
