package agentv1

const maxPort = 1<<16 - 1

// Validate implements the rules of the protocol.
func (*WatchEventsRequest) Validate() error { return nil }

// Validate implements the rules of the protocol.
func (m *Event) Validate() error {
	switch e := m.GetEvent().(type) {
	case *Event_Oom:
		return e.Oom.Validate()
	case *Event_Listen:
		return e.Listen.Validate()
	case *Event_Socket:
		return e.Socket.Validate()
	default:
		return invalid("event of a kind that is not known")
	}
}

// Validate implements the rules of the protocol.
func (m *OOMEvent) Validate() error { return validID("container_id", m.GetContainerId()) }

// Validate implements the rules of the protocol.
func (m *ListenEvent) Validate() error {
	if p := m.GetProtocol(); p != ListenEvent_PROTOCOL_TCP && p != ListenEvent_PROTOCOL_UDP {
		return invalid("protocol %d is not known", p)
	}
	if _, err := parseAddr(m.GetAddress()); err != nil {
		return err
	}
	if p := m.GetPort(); p == 0 || p > maxPort {
		return invalid("port %d is not in 1..%d", p, maxPort)
	}
	return nil
}
