// Package bootstrap is how containerd runs a shim's program: start, delete,
// -info and -v, in the dialect of the containerd that calls, and the daemon that
// start leaves behind.
//
//	containerd            start                       daemon
//	    │ argv, env, stdin  │                            │
//	    ├──────────────────>│ make the socket            │
//	    │                   ├── Program.Spawn: cgroup,   │
//	    │                   │   clone, new mount ns ────>│ log FIFO, propagation
//	    │                   │   fd 3 socket              │ Program.Serve
//	    │                   │   fd 4 ready pipe          │   begins to boot the VM
//	    │                   │   fd 5 host's mount ns     │   serves fd 3
//	    │                   │<── NUL, or why not ────────┤
//	    │<── the address ───┤                            │
//	    ├──────────────── ttrpc on the socket ──────────>│
//
// What start is called for decides what the daemon begins with, and whether there
// is one:
//
//	a container, or a pod's sandbox container   boots what the bundle's spec says
//	a member of a pod                           none: the address of the pod's
//	a pod by the sandbox API                    waits for CreateSandbox
//
// From its first moment a daemon is on record in its bundle, so that delete, which
// may come at any time, ends it.
package bootstrap
