package main

import "time"

const machine = "test/machine"

// tests are in the order in which they begin: those that say most first, for the last ones are left out where time is short, and of those that go side by side the longest, so that no turn is
// idle at the end. Tests that take all processors, or measure what a busy host would spoil, take all turns: with another beside it a node with Kubernetes takes twice as long and is not well all
// the time, and the twins' node does not answer. What is usual is what a test took in one run of all, on two processors that nobody else wanted; a short one is
// that without the minutes of faults, and the rows, that it leaves out.
var tests = []test{
	{pkg: machine, name: "KubeNodes", lanes: 2, usual: 310 * time.Second},
	{pkg: machine, name: "VMTwin", lanes: 2, usual: 80 * time.Second},
	{pkg: machine, name: "Flood", lanes: 2, usual: 90 * time.Second},
	{pkg: machine, name: "Nodes", lanes: 2, usual: 250 * time.Second},
	{pkg: machine, name: "Node", lanes: 2, usual: 805 * time.Second, short: 415 * time.Second},
	{pkg: machine, name: "Faults", lanes: 1, usual: 675 * time.Second, short: 255 * time.Second},
	{pkg: machine, name: "Upgrade", lanes: 1, usual: 735 * time.Second},
	{pkg: machine, name: "Cut", lanes: 1, usual: 245 * time.Second},
	{pkg: machine, name: "CutDisk", lanes: 1, usual: 275 * time.Second},
	{pkg: machine, name: "BootEnds", lanes: 1, usual: 165 * time.Second},
	{pkg: machine, name: "Install", lanes: 1, usual: 135 * time.Second},
	{pkg: machine, name: "Firmware", lanes: 1, usual: 125 * time.Second},
	{pkg: "init", name: "VM", lanes: 1, usual: 160 * time.Second},
	{pkg: machine, name: "Reset", lanes: 1, usual: 130 * time.Second},
	{pkg: machine, name: "Poison", lanes: 1, usual: 165 * time.Second},
	{pkg: machine, name: "Full", lanes: 1, usual: 85 * time.Second},
	{pkg: "storaged", name: "VMCrypt", lanes: 1, usual: 55 * time.Second},
	{pkg: machine, name: "NodeKeyServer", lanes: 1, usual: 75 * time.Second},
	{pkg: "deploy/image", name: "VMMeasured", lanes: 1, usual: 45 * time.Second},
	{pkg: machine, name: "BootSecurity", lanes: 1, usual: 20 * time.Second},
	{pkg: "deploy/qemu", name: "LANInVM", lanes: 1, usual: 5 * time.Second},
	{pkg: "deploy/qemu", name: "Boot", lanes: 1, usual: 10 * time.Second},
	{pkg: "services/kubeletd", name: "NodesAndTheRealAPIServer", lanes: 1, usual: 7 * time.Second},
	{pkg: "services/kubeletd", name: "NodeDrainAndTheRealAPIServer", lanes: 1, usual: 13 * time.Second},
	{pkg: machine, lanes: 2, usual: 5 * time.Second},
}

// shorter is what tests are told on a host on which there is no time for all: TestFaults' length, and the rows of TestNode's fault matrix.
var shorter = map[string]string{"BULKHEAD_FAULTS": "3m", "BULKHEAD_MATRIX": " killed"}
