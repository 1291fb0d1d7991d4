// Command kube is Kubernetes in one file: the API server, its controllers, the
// scheduler, the proxy, the kubelet and kubectl. Which one runs is decided by
// the name it was started under, so the image holds one binary and several
// links to it, and the processes of a node share its text pages.
//
// It may only choose. Flags, defaults and behaviour are upstream's; what a
// node passes to them is the business of whoever starts them, on the command
// line or, one flag per line, in the file that KUBE_ARGS_FILE names.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	_ "time/tzdata" // a CronJob's time zone; the image has no /usr/share/zoneinfo

	"github.com/spf13/cobra"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubectl's sign-in plugins
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"          // --logging-format=json
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client-go's metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // the build_info metric
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// A component is one command of Kubernetes. Its run reads os.Args, as upstream's
// do, and returns the exit code.
type component struct {
	name string
	run  func() int
}

var components = []component{
	{"kube-apiserver", func() int { return daemon(apiserver.NewAPIServerCommand()) }},
	{"kube-controller-manager", func() int { return daemon(controllers.NewControllerManagerCommand()) }},
	{"kube-proxy", func() int { return daemon(proxy.NewProxyCommand()) }},
	{"kube-scheduler", func() int { return daemon(scheduler.NewSchedulerCommand()) }},
	{"kubectl", runKubectl},
	{"kubelet", func() int { return daemon(kubelet.NewKubeletCommand(context.Background())) }},
}

func daemon(c *cobra.Command) int { return cli.Run(c) }

// runKubectl is upstream's main. The level of the log is set first, because
// making the command already reads files and logs.
func runKubectl() int {
	logs.GlogSetter(kubectl.GetLogVerbosity(os.Args)) //nolint:errcheck // as upstream
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err) // prints and exits
	}
	return 0
}

// choose picks the component that argv asks for, by the base name of argv[0] or
// by argv[1], and the argv it shall see.
func choose(argv []string) (component, []string, error) {
	asked := "no name"
	if len(argv) > 0 {
		if c, ok := find(filepath.Base(argv[0])); ok {
			return c, argv, nil
		}
	}
	if len(argv) > 1 {
		if c, ok := find(argv[1]); ok {
			return c, argv[1:], nil
		}
		asked = strconv.Quote(argv[1])
	}
	var names []string
	for _, c := range components {
		names = append(names, c.name)
	}
	return component{}, nil, fmt.Errorf("kube: %s is not one of %s", asked, strings.Join(names, ", "))
}

func find(name string) (component, bool) {
	for _, c := range components {
		if c.name == name {
			return c, true
		}
	}
	return component{}, false
}

func main() {
	c, argv, err := choose(os.Args)
	if err == nil {
		argv, err = withFile(argv, os.Getenv(argsVariable))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	os.Args = argv
	os.Exit(c.run())
}
