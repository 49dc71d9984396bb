package agentv1

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Limits of the protocol. They hold in both directions: the guest is not
// trusted, and the agent tells a broken host what is wrong.
const (
	// MaxSpecBytes bounds the OCI spec of a container. With the message around
	// it, ttrpc's own limit of 4 MiB a message is what is met first.
	MaxSpecBytes = 4 << 20
	// MaxProcessBytes bounds the OCI process of an exec.
	MaxProcessBytes = 1 << 20
	// MaxEntropyBytes bounds the random bytes of Configure.
	MaxEntropyBytes = 512
	// GuestDir is the guest directory that storages are mounted below.
	GuestDir = "/run/husk"
	// SharedPID is the guest path that a spec gives to its PID namespace for the
	// one that containers share. The agent makes it with the first of them. The
	// shared IPC and UTS namespaces are the guest's own: a spec names none.
	SharedPID = GuestDir + "/ns/pid"
	// containerPID is the directory of ContainerPID's paths.
	containerPID = GuestDir + "/ns/pid-of"
	// SharedShm is the guest directory that is the /dev/shm of containers which
	// share the IPC namespace: they bind it. It is there from Configure on.
	SharedShm = GuestDir + "/shm"
	// VolumesDir holds the sandbox's volumes that are the guest's own: memory, huge
	// pages.
	VolumesDir = GuestDir + "/volumes"
	// CopiesDir holds what is copied from the host, and kept as it is there.
	CopiesDir = GuestDir + "/copies"
	// SocketsDir holds the sockets that stand for sockets of the host.
	SocketsDir = GuestDir + "/sockets"

	maxIDLen       = 128
	maxTextLen     = 128
	maxHostname    = 64 // utsname.nodename without its terminator
	maxTag         = 35 // virtio-fs: 36 bytes with the terminator
	maxPathLen     = 4095
	maxStorages    = 64
	maxFileSystems = 4096
	maxSysctls     = 256
	maxSysctlLen   = 4095
	maxShmBytes    = 1 << 50
	maxCells       = 1<<16 - 1 // struct winsize is 16 bits
	maxPID         = 1 << 22   // PID_MAX_LIMIT
	maxProcesses   = 1 << 16
	maxSignal      = 64
	maxExitStatus  = 255
	tokenLen       = 16 // protocols/stream.TokenLen
)

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// validID accepts [A-Za-z0-9_.-]{1,128} but "." and "..": an id is safe as a
// file name and as an argument that follows others.
func validID(field, id string) error {
	if id == "" {
		return invalid("%s is empty", field)
	}
	if len(id) > maxIDLen {
		return invalid("%s has %d bytes, at most %d", field, len(id), maxIDLen)
	}
	if id == "." || id == ".." {
		return invalid("%s is %q", field, id)
	}
	for _, c := range []byte(id) {
		if !isAlnum(c) && c != '_' && c != '.' && c != '-' {
			return invalid("%s %q holds %q: use letters, digits, '_', '.' and '-'", field, id, c)
		}
	}
	return nil
}

// ContainerPID is the guest path that a spec gives to its PID namespace for that of
// the container of that id. There is no file: the agent finds the namespace when it
// makes the container.
func ContainerPID(id string) string { return containerPID + "/" + id }

// ContainerOfPID returns the id that ContainerPID has made path of; ok is false
// where it has not.
func ContainerOfPID(path string) (id string, ok bool) {
	id, ok = strings.CutPrefix(path, containerPID+"/")
	return id, ok && validID("container", id) == nil
}

func validOptionalID(field, id string) error {
	if id == "" {
		return nil
	}
	return validID(field, id)
}

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// validText accepts up to n bytes of printable ASCII: what may go into a log.
func validText(field, s string, n int) error {
	if len(s) > n {
		return invalid("%s has %d bytes, at most %d", field, len(s), n)
	}
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			return invalid("%s holds the byte %#x", field, c)
		}
	}
	return nil
}

func validToken(field string, t []byte) error {
	if len(t) != 0 && len(t) != tokenLen {
		return invalid("%s token has %d bytes, want 0 or %d", field, len(t), tokenLen)
	}
	return nil
}

func validClock(ns int64) error {
	if ns <= 0 {
		return invalid("clock_ns %d is not after 1970", ns)
	}
	return nil
}

func validSize(columns, rows uint32) error {
	if columns > maxCells || rows > maxCells {
		return invalid("terminal of %d by %d cells, at most %d by %d", columns, rows, maxCells, maxCells)
	}
	return nil
}

func validPID(pid uint32) error {
	if pid == 0 || pid > maxPID {
		return invalid("pid %d is not in 1..%d", pid, maxPID)
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *HelloRequest) Validate() error { return validText("version", m.GetVersion(), maxTextLen) }

// Validate implements the rules of the protocol.
func (m *HelloResponse) Validate() error {
	if err := validText("version", m.GetVersion(), maxTextLen); err != nil {
		return err
	}
	if err := validText("kernel_release", m.GetKernelRelease(), maxTextLen); err != nil {
		return err
	}
	if m.GetAgentReadyUs() < m.GetAgentStartUs() {
		return invalid("agent_ready_us %d is before agent_start_us %d", m.GetAgentReadyUs(), m.GetAgentStartUs())
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *ConfigureRequest) Validate() error {
	if err := validID("sandbox_id", m.GetSandboxId()); err != nil {
		return err
	}
	if err := validHostname(m.GetHostname()); err != nil {
		return err
	}
	if err := validClock(m.GetClockNs()); err != nil {
		return err
	}
	if n := len(m.GetEntropy()); n > MaxEntropyBytes {
		return invalid("entropy has %d bytes, at most %d", n, MaxEntropyBytes)
	}
	if n := len(m.GetStorages()); n > maxStorages {
		return invalid("%d storages, at most %d", n, maxStorages)
	}
	targets := make(map[string]bool, len(m.GetStorages()))
	for i, s := range m.GetStorages() {
		if err := s.Validate(); err != nil {
			return fmt.Errorf("storages[%d]: %w", i, err)
		}
		if targets[s.GetTarget()] {
			return invalid("storages[%d]: target %q is taken", i, s.GetTarget())
		}
		targets[s.GetTarget()] = true
	}
	if n := len(m.GetSysctls()); n > maxSysctls {
		return invalid("%d sysctls, at most %d", n, maxSysctls)
	}
	for i, s := range m.GetSysctls() {
		if err := s.Validate(); err != nil {
			return fmt.Errorf("sysctls[%d]: %w", i, err)
		}
	}
	if n := m.GetShmBytes(); n > maxShmBytes {
		return invalid("shm_bytes %d, at most %d", n, int64(maxShmBytes))
	}
	if err := m.GetNetwork().Validate(); err != nil { // one that is unset is valid
		return fmt.Errorf("network: %w", err)
	}
	return nil
}

func validHostname(name string) error {
	if len(name) > maxHostname {
		return invalid("hostname has %d bytes, at most %d", len(name), maxHostname)
	}
	for _, c := range []byte(name) {
		if !isAlnum(c) && c != '.' && c != '-' && c != '_' {
			return invalid("hostname %q holds %q", name, c)
		}
	}
	return nil
}

// Validate implements the rules of the protocol.
func (*ConfigureResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *Sysctl) Validate() error {
	key := m.GetKey()
	if key == "" || len(key) > maxPathLen {
		return invalid("sysctl key of %d bytes, want 1 to %d", len(key), maxPathLen)
	}
	for _, c := range []byte(key) {
		if !isAlnum(c) && !strings.ContainsRune("_-./:@", rune(c)) {
			return invalid("sysctl key %q holds %q", key, c)
		}
	}
	if strings.HasPrefix(key, "/") || path.Clean(key) != key || strings.Contains(key, "..") {
		return invalid("sysctl key %q is not of the form a/b/c or a.b.c", key)
	}
	if n := len(m.GetValue()); n > maxSysctlLen {
		return invalid("sysctl %s: value has %d bytes, at most %d", key, n, maxSysctlLen)
	}
	if strings.ContainsRune(m.GetValue(), 0) {
		return invalid("sysctl %s: value holds a zero byte", key)
	}
	return nil
}

// Below tells whether p is a clean absolute path strictly below dir. It does
// not look at the file system.
func Below(p, dir string) bool {
	return len(p) <= maxPathLen && path.Clean(p) == p && strings.HasPrefix(p, dir+"/") && !strings.ContainsRune(p, 0)
}

// Validate implements the rules of the protocol.
func (m *SyncClockRequest) Validate() error { return validClock(m.GetClockNs()) }

// Validate implements the rules of the protocol.
func (*SyncClockResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*ShutdownRequest) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*ShutdownResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *Streams) Validate() error {
	if err := validToken("stdin", m.GetStdin()); err != nil {
		return err
	}
	if err := validToken("stdout", m.GetStdout()); err != nil {
		return err
	}
	if err := validToken("stderr", m.GetStderr()); err != nil {
		return err
	}
	if m.GetTerminal() && len(m.GetStderr()) > 0 {
		return invalid("streams: a terminal has no stderr of its own")
	}
	if !m.GetTerminal() && (m.GetColumns() != 0 || m.GetRows() != 0) {
		return invalid("streams: a size without a terminal")
	}
	return validSize(m.GetColumns(), m.GetRows())
}

// Validate implements the rules of the protocol.
func (m *CreateContainerRequest) Validate() error {
	if err := validID("container_id", m.GetContainerId()); err != nil {
		return err
	}
	if n := len(m.GetSpec()); n == 0 || n > MaxSpecBytes {
		return invalid("spec has %d bytes, want 1 to %d", n, MaxSpecBytes)
	}
	if err := validFileSystems(m.GetFileSystems()); err != nil {
		return err
	}
	return m.GetStreams().Validate()
}

// Validate implements the rules of the protocol.
func (m *CreateContainerResponse) Validate() error { return validPID(m.GetPid()) }

// Validate implements the rules of the protocol.
func (m *StartContainerRequest) Validate() error { return validID("container_id", m.GetContainerId()) }

// Validate implements the rules of the protocol.
func (*StartContainerResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *ExecProcessRequest) Validate() error {
	if err := validID("container_id", m.GetContainerId()); err != nil {
		return err
	}
	if err := validID("exec_id", m.GetExecId()); err != nil {
		return err
	}
	if n := len(m.GetProcess()); n == 0 || n > MaxProcessBytes {
		return invalid("process has %d bytes, want 1 to %d", n, MaxProcessBytes)
	}
	return m.GetStreams().Validate()
}

// Validate implements the rules of the protocol.
func (m *ExecProcessResponse) Validate() error { return validPID(m.GetPid()) }

// Validate implements the rules of the protocol.
func (m *SignalProcessRequest) Validate() error {
	if err := validIDs(m); err != nil {
		return err
	}
	if s := m.GetSignal(); s == 0 || s > maxSignal {
		return invalid("signal %d is not in 1..%d", s, maxSignal)
	}
	if m.GetAll() && m.GetExecId() != "" {
		return invalid("signal to every process of the container names the exec %q", m.GetExecId())
	}
	return nil
}

// validIDs checks the ids of a message that names a container and perhaps one
// of its execs.
func validIDs(m interface {
	GetContainerId() string
	GetExecId() string
},
) error {
	if err := validID("container_id", m.GetContainerId()); err != nil {
		return err
	}
	return validOptionalID("exec_id", m.GetExecId())
}

// Validate implements the rules of the protocol.
func (*SignalProcessResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *WaitProcessRequest) Validate() error { return validIDs(m) }

// Validate implements the rules of the protocol.
func (m *WaitProcessResponse) Validate() error {
	if s := m.GetExitStatus(); s > maxExitStatus {
		return invalid("exit_status %d is not in 0..%d", s, maxExitStatus)
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *ResizeTTYRequest) Validate() error {
	if err := validIDs(m); err != nil {
		return err
	}
	return validSize(m.GetColumns(), m.GetRows())
}

// Validate implements the rules of the protocol.
func (*ResizeTTYResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *RemoveContainerRequest) Validate() error { return validIDs(m) }

// Validate implements the rules of the protocol.
func (*RemoveContainerResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *ListProcessesRequest) Validate() error { return validID("container_id", m.GetContainerId()) }

// Validate implements the rules of the protocol.
func (m *ListProcessesResponse) Validate() error {
	if n := len(m.GetProcesses()); n > maxProcesses {
		return invalid("%d processes, at most %d", n, maxProcesses)
	}
	for i, p := range m.GetProcesses() {
		if err := p.Validate(); err != nil {
			return fmt.Errorf("processes[%d]: %w", i, err)
		}
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *ProcessInfo) Validate() error {
	if err := validPID(m.GetPid()); err != nil {
		return err
	}
	return validOptionalID("exec_id", m.GetExecId())
}
