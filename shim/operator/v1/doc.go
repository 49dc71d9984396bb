// Package operatorv1 is what the operator's tool and a shim say to each other. It is
// generated from operator.proto; validate.go holds what the tool demands of an answer.
package operatorv1

//go:generate sh -c "cd ../../.. && protoc --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --plugin=protoc-gen-go-ttrpc=$(go tool -n protoc-gen-go-ttrpc) --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative shim/operator/v1/operator.proto"
