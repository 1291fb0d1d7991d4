package main

import "time"

const machine = "test/machine"

// tests are in the order in which they begin: those that say most first, for the last ones are left out where time is short, and of those that go side by side the longest, so that no turn is
// idle at the end. Tests that take all processors, or measure what a busy host would spoil, take all turns: with another beside it a node with Kubernetes takes twice as long and is not well all
// the time, and the twins' node does not answer. What is usual is what a test took in a run of all on a slow host, TestKubeNodes and a short TestFaults by
// themselves, divided by 1.3; TestUpgrade, TestCutDisk and TestInstall in a later one, by 1.4, by which others were slower then: what matters is how they compare.
var tests = []test{
	{pkg: machine, name: "KubeNodes", lanes: 2, usual: 380 * time.Second},
	{pkg: machine, name: "VMTwin", lanes: 2, usual: 75 * time.Second},
	{pkg: machine, name: "Flood", lanes: 2, usual: 70 * time.Second},
	{pkg: machine, name: "Nodes", lanes: 2, usual: 300 * time.Second},
	{pkg: machine, name: "Node", lanes: 2, usual: 820 * time.Second, short: 450 * time.Second},
	{pkg: machine, name: "Faults", lanes: 1, usual: 560 * time.Second, short: 220 * time.Second},
	{pkg: machine, name: "Upgrade", lanes: 1, usual: 610 * time.Second},
	{pkg: machine, name: "Cut", lanes: 1, usual: 290 * time.Second},
	{pkg: machine, name: "CutDisk", lanes: 1, usual: 340 * time.Second},
	{pkg: machine, name: "BootEnds", lanes: 1, usual: 180 * time.Second},
	{pkg: machine, name: "Install", lanes: 1, usual: 185 * time.Second},
	{pkg: machine, name: "Firmware", lanes: 1, usual: 100 * time.Second},
	{pkg: "init", name: "VM", lanes: 1, usual: 135 * time.Second},
	{pkg: machine, name: "Reset", lanes: 1, usual: 140 * time.Second},
	{pkg: machine, name: "Poison", lanes: 1, usual: 150 * time.Second},
	{pkg: machine, name: "Full", lanes: 1, usual: 105 * time.Second},
	{pkg: "storaged", name: "VMCrypt", lanes: 1, usual: 50 * time.Second},
	{pkg: machine, name: "NodeKeyServer", lanes: 1, usual: 90 * time.Second},
	{pkg: "deploy/image", name: "VMMeasured", lanes: 1, usual: 40 * time.Second},
	{pkg: machine, name: "BootSecurity", lanes: 1, usual: 25 * time.Second},
	{pkg: "deploy/qemu", name: "LANInVM", lanes: 1, usual: 5 * time.Second},
	{pkg: "deploy/qemu", name: "Boot", lanes: 1, usual: 12 * time.Second},
	{pkg: "services/kubeletd", name: "NodesAndTheRealAPIServer", lanes: 1, usual: 8 * time.Second},
	{pkg: "services/kubeletd", name: "NodeDrainAndTheRealAPIServer", lanes: 1, usual: 13 * time.Second},
	{pkg: machine, lanes: 2, usual: 5 * time.Second},
}

// shorter is what tests are told on a host on which there is no time for all: TestFaults' length, and the rows of TestNode's fault matrix.
var shorter = map[string]string{"BULKHEAD_FAULTS": "3m", "BULKHEAD_MATRIX": " killed"}
