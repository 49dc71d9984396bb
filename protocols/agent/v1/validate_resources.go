package agentv1

const (
	// MaxResourcesBytes bounds the OCI resources of an update.
	MaxResourcesBytes = 1 << 20
	// AllCPUs is cpu.cpus, in an update, of a container that is no longer confined: it has
	// all the guest's CPUs, also those to come.
	AllCPUs = "all"

	maxCPUs      = 1 << 12
	maxDevices   = 256
	maxPageSizes = 16
	maxPageSize  = 16
	maxReported  = 64 // interfaces of statistics
)

// Validate implements the rules of the protocol.
func (m *UpdateContainerRequest) Validate() error {
	if err := validID("container_id", m.GetContainerId()); err != nil {
		return err
	}
	if n := len(m.GetResources()); n == 0 || n > MaxResourcesBytes {
		return invalid("resources have %d bytes, want 1 to %d", n, MaxResourcesBytes)
	}
	return nil
}

// Validate implements the rules of the protocol.
func (*UpdateContainerResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *PauseContainerRequest) Validate() error { return validID("container_id", m.GetContainerId()) }

// Validate implements the rules of the protocol.
func (*PauseContainerResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *ResumeContainerRequest) Validate() error { return validID("container_id", m.GetContainerId()) }

// Validate implements the rules of the protocol.
func (*ResumeContainerResponse) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *StatsContainerRequest) Validate() error {
	return validOptionalID("container_id", m.GetContainerId())
}

// Validate implements the rules of the protocol: numbers are the guest's word, and
// what is bounded is how many there are.
func (m *StatsContainerResponse) Validate() error {
	if err := m.GetIo().Validate(); err != nil {
		return err
	}
	if n := len(m.GetHugetlb()); n > maxPageSizes {
		return invalid("hugetlb has %d page sizes, at most %d", n, maxPageSizes)
	}
	for _, h := range m.GetHugetlb() {
		if err := h.Validate(); err != nil {
			return err
		}
	}
	if n := len(m.GetInterfaces()); n > maxReported {
		return invalid("%d interfaces, at most %d", n, maxReported)
	}
	for _, iface := range m.GetInterfaces() {
		if err := iface.Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Validate implements the rules of the protocol.
func (*Pressure) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*PressureLine) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*CPUStats) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*MemoryStats) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*MemoryEvents) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (*PidsStats) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *IOStats) Validate() error {
	if n := len(m.GetDevices()); n > maxDevices {
		return invalid("io has %d devices, at most %d", n, maxDevices)
	}
	for _, d := range m.GetDevices() {
		if err := d.Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *DeviceIO) Validate() error {
	if m.GetMajor() > maxMajor || m.GetMinor() > maxMinor {
		return invalid("no device has the numbers %d:%d", m.GetMajor(), m.GetMinor())
	}
	return nil
}

// Validate implements the rules of the protocol.
func (m *HugetlbStats) Validate() error {
	if m.GetPageSize() == "" {
		return invalid("page_size is empty")
	}
	return validText("page_size", m.GetPageSize(), maxPageSize)
}

// Validate implements the rules of the protocol.
func (m *InterfaceStats) Validate() error { return validDevName(m.GetName()) }

// Validate implements the rules of the protocol.
func (m *OnlineResourcesRequest) Validate() error { return validCPUs(m.GetCpus()) }

// Validate implements the rules of the protocol.
func (m *OnlineResourcesResponse) Validate() error { return validCPUs(m.GetCpus()) }

func validCPUs(n uint32) error {
	if n > maxCPUs {
		return invalid("%d CPUs, at most %d", n, maxCPUs)
	}
	return nil
}
