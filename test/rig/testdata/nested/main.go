// Command nested is the first process of the guest that the rig's test boots by
// KVM inside the rig.
package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

func main() {
	fmt.Println("nested guest runs")
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) //nolint:errcheck // a PID 1 that returns ends the machine too
}
