package main

const usage = `husk - the operator's tool of Husk

Usage:
  husk check [-config FILE]      check whether this host can start pods
  husk status [FLAG]... [POD]    show the pods of this host, or all about one
  husk reclaim [FLAG]... POD     have a pod give memory back to the host
  husk pause [FLAG]... POD       stop a pod's virtual machine
  husk resume [FLAG]... POD      have it go on
  husk cp [FLAG]... SRC DST      copy files to or from a container
  husk version [-json]           print version, commit and Go version
  husk help                      print this

husk COMMAND -h tells more of status, reclaim, pause, resume and cp.

check reads FILE, or else the file that HUSK_CONFIG names, or else
/etc/husk/configuration.toml. It prints a line per requirement, "ok", "warn" or
"FAIL", with cause and remedy. It should run as root, as the shim does.

Exit status: 0 all is well, 1 no pod can start here or nothing was done, 2 wrong
usage.
`

const statusUsage = `husk status - show the pods of this host, or all about one

Usage:
  husk status [-n NAMESPACE] [-json] [-config FILE] [POD]

Without POD a line for each: its state, the VM's size now, and what it can grow to where
that is more, the memory that the host holds for it, the host's CPUs that its vCPUs may
run on, its age.

With POD, which is the id of its sandbox or the beginning of one: its containers, the
threads of its vCPUs, its processes on the host, each with its threads, the CPUs that they
may run on and ran on last, its memory and the NUMA nodes of that; its cgroups; the
pressure on CPU, memory and io, of its cgroup where the host has version 2, or else of
the host; and the other pods that may run on the same CPUs. A line "warning:" for each
thing that may run where a vCPU is pinned.

Memory is proportional (PSS): what processes share is counted once. A line "unknown:"
says what could not be found out, and why: where a shim does not answer, the rest is from
its record and from the kernel.

  -n NAMESPACE      containerd's; default: CONTAINERD_NAMESPACE, or else all
  -json             for programs: a list, or with POD an object, with stable names
  -config FILE      Husk's configuration, as for husk check

It needs root. Exit status: 0 it was shown, 1 not, 2 wrong usage.
`

// podUsage is that of a command about one pod.
func podUsage(command, does, text string) string {
	return "husk " + command + " - " + does + `

Usage:
  husk ` + command + ` [-n NAMESPACE] [-config FILE] POD

POD is the id of a pod's sandbox (crictl pods -q) or the beginning of one. ` + text + `

  -n NAMESPACE      containerd's; default: CONTAINERD_NAMESPACE, or else "default".
                    That of Kubernetes is k8s.io
  -config FILE      Husk's configuration, as for husk check

It needs root. Exit status: 0 it was done, 1 not, 2 wrong usage.
`
}
