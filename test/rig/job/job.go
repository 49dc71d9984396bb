// Package job is what the two halves of the rig tell each other: the command to
// run, how it ended, and the names of the devices between them.
//
//	rig                                        init, in the machine
//	 | initrd: File holds a Job                  |
//	 |==========================================>| set up, run the command
//	 | OutPort, ErrPort: bytes, as written       |
//	 |<==========================================|
//	 | ResultPort: Result as a line of JSON      |
//	 |<------------------------------------------| wait for the end
//	 | once as many bytes arrived as Result says: ends the machine
package job

// File is the path in the initrd of the Job as JSON.
const File = "job.json"

// ModuleDir is the directory in the initrd of the kernel modules. Their order by
// name is the order to load them in.
const ModuleDir = "modules"

// Names of the virtio-serial ports.
const (
	ResultPort = "rig.result"
	OutPort    = "rig.stdout"
	ErrPort    = "rig.stderr"
)

// Tags of the virtio-fs shares.
const (
	RootTag = "root" // the host's root, read-only
	OutTag  = "out"  // the directory for results, where Job.Out says so
)

// A Job is a command to run in the machine.
type Job struct {
	// Args is the command with its arguments. A command without a slash is
	// looked up in the PATH of Env.
	Args []string
	// Env is the whole environment, as KEY=VALUE; of two with one key the later
	// counts.
	Env []string
	// Dir is the working directory.
	Dir string
	// Out tells that the share OutTag is there, to be mounted at /out.
	Out bool
}

// A Result is how a Job ended.
type Result struct {
	// Code is the command's exit code; 128 plus the signal's number where a
	// signal ended it; as a shell has it, 127 where there is no such command and
	// 126 where it does not start.
	Code int
	// Stdout and Stderr count the bytes written to the two ports.
	Stdout, Stderr int64
}
