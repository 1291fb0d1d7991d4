package version

import (
	"os"
	"strings"
	"testing"
)

func TestKubernetesIsWhatTheImageHolds(t *testing.T) {
	mod, err := os.ReadFile("../../deploy/upstream/kubernetes/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mod), "k8s.io/kubernetes "+Kubernetes+"\n") {
		t.Errorf("deploy/upstream/kubernetes/go.mod does not require k8s.io/kubernetes %s", Kubernetes)
	}
}
