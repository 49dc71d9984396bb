package cri

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const trustDomain = "example.test"

// A workloadAPI is a server of SPIFFE's Workload API that attests its callers as one
// for Kubernetes does: by the cgroup of the process at the other end of the socket,
// which tells the pod and the container.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

// serveWorkloadAPI serves on a socket of the host.
func (e *env) serveWorkloadAPI(socket string) {
	e.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		e.Fatal(err)
	}
	api := &workloadAPI{}
	var err error
	api.ca, api.key, err = issue(&url.URL{Scheme: "spiffe", Host: trustDomain}, nil, nil)
	if err != nil {
		e.Fatal(err)
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		e.Fatal(err)
	}
	if err := os.Chmod(socket, 0o777); err != nil {
		e.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(peerCredentials{}))
	workload.RegisterSpiffeWorkloadAPIServer(server, api)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(ln) //nolint:errcheck // it ends with the server
	}()
	e.Cleanup(func() {
		server.Stop()
		<-done
	})
}

// issue makes a certificate for an id, signed by a CA's key, or by its own.
func issue(id *url.URL, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{id}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if ca == nil {
		template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
		ca, caKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}

// FetchX509SVID implements workload.SpiffeWorkloadAPIServer.
func (api *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	if !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "the security header is missing")
	}
	caller, ok := peer.FromContext(stream.Context())
	if !ok {
		return status.Error(codes.Internal, "no peer")
	}
	id, err := attest(caller.AuthInfo.(peerInfo).cred)
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	cert, key, err := issue(id, api.ca, api.key)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	err = stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: id.String(), X509Svid: cert.Raw, X509SvidKey: raw, Bundle: api.ca.Raw,
	}}})
	if err != nil {
		return err
	}
	<-stream.Context().Done() // a later SVID would come by the same stream
	return nil
}

// attest makes the id of a caller: pod's cgroup, container's, user.
func attest(cred *unix.Ucred) (*url.URL, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cred.Pid))
	if err != nil {
		return nil, err
	}
	// Every hierarchy has to say the same, but those that the runtime has left out.
	var cgroup string
	for line := range strings.Lines(string(raw)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(fields) != 3 || fields[2] == "/":
		case cgroup == "":
			cgroup = fields[2]
		case cgroup != fields[2]:
			return nil, fmt.Errorf("process %d is in several cgroups:\n%s", cred.Pid, raw)
		}
	}
	if strings.Count(cgroup, "/") != 2 {
		return nil, fmt.Errorf("process %d is in no container's cgroup:\n%s", cred.Pid, raw)
	}
	return url.Parse(spiffeID(cgroup, cred.Uid))
}

func spiffeID(cgroup string, uid uint32) string {
	return fmt.Sprintf("spiffe://%s%s/uid/%d", trustDomain, path.Clean(cgroup), uid)
}

// peerCredentials are grpc's credentials of a unix socket's server: the kernel's word
// on who connected.
type peerCredentials struct{}

type peerInfo struct{ cred *unix.Ucred }

func (peerInfo) AuthType() string { return "SO_PEERCRED" }

// ServerHandshake implements credentials.TransportCredentials.
func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return nil, nil, err
	}
	return conn, peerInfo{cred}, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are a server's")
}

// Info implements credentials.TransportCredentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "SO_PEERCRED"}
}

// Clone implements credentials.TransportCredentials.
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (peerCredentials) OverrideServerName(string) error { return nil }

// Each container of each pod gets the identity that is its own, whether it mounts the
// socket or the directory that holds it.
func TestWorkloadAPI(t *testing.T) {
	each(t, setup{}, func(e *env) {
		client, dir := e.sockClient(), filepath.Join(e.d.Dir, "spire")
		socket := filepath.Join(dir, "agent.sock")
		e.serveWorkloadAPI(socket)
		endpoint := func(c *runtime.ContainerConfig) {
			c.Envs = []*runtime.KeyValue{{Key: "SPIFFE_ENDPOINT_SOCKET", Value: []byte("unix:///run/spire/agent.sock")}}
		}
		want := func(p *pod, c *container, uid uint32) {
			e.Helper()
			c.want(clientDir+"/sockclient svid", spiffeID(p.config.Linux.CgroupParent+"/"+c.id, uid))
		}
		p, q := e.run("one"), e.run("two")
		a := p.start("a", idle, endpoint, withSockets(client, socket, "/run/spire/agent.sock"), asUser(1234, 2345))
		b := p.start("b", idle, endpoint, withSockets(client, dir, "/run/spire"))
		c := q.start("c", idle, endpoint, withSockets(client, dir, "/run/spire"), asUser(1234, 2345))
		// Two of one pod share the directory, and are two all the same.
		f := p.start("f", idle, endpoint, withSockets(client, dir, "/run/spire"), asUser(4321, 2345))
		for range 2 {
			want(p, a, 1234)
			want(p, b, 0)
			want(p, f, 4321)
			want(q, c, 1234)
		}
		// An id goes with its container.
		b.stop()
		b.remove()
		d := p.start("d", idle, endpoint, withSockets(client, socket, "/run/spire/agent.sock"))
		want(p, d, 0)
		want(p, a, 1234)
		want(p, f, 4321)
		p.remove()
		q.remove()
		e.settled()
	})
}
