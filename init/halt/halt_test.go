package halt

import (
	"fmt"
	"testing"
)

func TestOrder(t *testing.T) {
	got := fmt.Sprint(Order([]string{"apid", "containerd", "etcdd", "kube-apiserver", "kube-proxy", "kubeletd", "kubelet", "storaged", "workload"}))
	if want := "[[kube-apiserver kube-proxy kubelet] [containerd] [apid etcdd kubeletd workload] [storaged]]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
