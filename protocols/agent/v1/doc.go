// Package agentv1 is the control protocol between the shim and the agent in the
// guest. It is generated from agent.proto; validate.go holds what both ends
// demand of every message.
package agentv1

//go:generate sh -c "cd ../../.. && protoc --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --plugin=protoc-gen-go-ttrpc=$(go tool -n protoc-gen-go-ttrpc) --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative protocols/agent/v1/agent.proto"
