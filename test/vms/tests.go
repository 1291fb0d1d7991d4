package main

import "time"

const machine = "test/machine"

// tests are in the order in which they begin: those that say most first, for the last ones are left out where time is short. Tests that take all processors, or measure what a busy host would
// spoil, take all turns: with another beside it a node with Kubernetes takes twice as long and is not well all the time. After them the longest come first, so that no turn is idle at the end.
var tests = []test{
	{machine, "KubeNodes", 2, 400 * time.Second},
	{machine, "Node", 2, 800 * time.Second},
	{machine, "Nodes", 2, 310 * time.Second},
	{machine, "Flood", 2, 130 * time.Second},
	{machine, "VMTwin", 2, 80 * time.Second},
	{machine, "Faults", 1, 700 * time.Second},
	{machine, "Upgrade", 1, 546 * time.Second},
	{machine, "Cut", 1, 200 * time.Second},
	{machine, "CutDisk", 1, 200 * time.Second},
	{machine, "BootEnds", 1, 150 * time.Second},
	{machine, "Install", 1, 150 * time.Second},
	{machine, "Firmware", 1, 100 * time.Second},
	{"init", "VM", 1, 100 * time.Second},
	{machine, "Reset", 1, 120 * time.Second},
	{machine, "Poison", 1, 100 * time.Second},
	{machine, "Full", 1, 90 * time.Second},
	{"storaged", "VMCrypt", 1, 40 * time.Second},
	{machine, "NodeKeyServer", 1, 60 * time.Second},
	{"deploy/image", "VMMeasured", 1, 40 * time.Second},
	{machine, "BootSecurity", 1, 50 * time.Second},
	{"deploy/qemu", "LANInVM", 1, 20 * time.Second},
	{"deploy/qemu", "Boot", 1, 20 * time.Second},
	{"services/kubeletd", "NodesAndTheRealAPIServer", 1, 30 * time.Second},
	{"services/kubeletd", "NodeDrainAndTheRealAPIServer", 1, 30 * time.Second},
	{machine, "", 2, 5 * time.Second},
}

// shorter is what tests are told on a host on which there is no time for all: TestFaults' length, and the rows of TestNode's fault matrix.
var shorter = map[string]string{"BULKHEAD_FAULTS": "3m", "BULKHEAD_MATRIX": " killed"}
