package main

import (
	"slices"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	for _, c := range []struct{ argv, want string }{
		{"kubelet --v=2", "kubelet: kubelet --v=2"},
		{"/usr/bin/kube-apiserver", "kube-apiserver: /usr/bin/kube-apiserver"},
		{"kubectl kubelet", "kubectl: kubectl kubelet"}, // an argument is not a name
		{"kube kubectl get pods", "kubectl: kubectl get pods"},
		{"/usr/bin/kube kube-proxy", "kube-proxy: kube-proxy"},
		{"kube", `kube: no name is not one of kube-apiserver, kube-controller-manager, kube-proxy, kube-scheduler, kubectl, kubelet`},
		{"kube kube", `kube: "kube" is not one of kube-apiserver, kube-controller-manager, kube-proxy, kube-scheduler, kubectl, kubelet`},
		{"", `kube: no name is not one of kube-apiserver, kube-controller-manager, kube-proxy, kube-scheduler, kubectl, kubelet`},
	} {
		in := strings.Fields(c.argv)
		before := slices.Clone(in)
		chosen, argv, err := choose(in)
		got := chosen.name + ": " + strings.Join(argv, " ")
		if err != nil {
			got = err.Error()
		}
		if got != c.want || !slices.Equal(in, before) {
			t.Errorf("%q: got %s, want %s", c.argv, got, c.want)
		}
	}
}
