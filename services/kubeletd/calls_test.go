package kubeletd

import (
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of a control plane's kubeletd, with an API server that grants everything and a PID 1 that obeys, as every caller.
func FuzzCalls(f *testing.F) {
	ca := testca.New(f)
	api := newAPIServer(f, ca)
	w := newWorld(f, ca, api, clusterNode("cp", "controlplane", "127.0.0.1"), clusterNode("w1", "worker", "10.5.0.101"))
	api.put(nodesPath+"/cp", nodeObjectOf("cp", "127.0.0.1", "10.244.0.0/24"))
	api.put(nodesPath+"/w1", nodeObjectOf("w1", "10.5.0.101", "10.244.1.0/24"))
	s := testrpc.Listen(f)
	d := w.make(controlPlaneDocument, s.Env("kubeletd"))
	s.Ready = func() bool { st, _ := d.status.Get(); return st.GetApiReady() }
	s.Fuzz(f, d.Run, callers)
}
