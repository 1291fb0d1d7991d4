package main

import "github.com/spf13/cobra"

// scopeKind says what a command does with --node and --all.
type scopeKind int

const (
	nowhere scopeKind = iota // it asks no node, or none that another node could be asked for
	single                   // it asks one node
	many                     // it asks one node or several
	lines                    // like many, and prints lines as they come
)

type scope struct {
	kind scopeKind
	why  string // for a refusal
}

// scopes is the table of all commands. A test wants every command here: whoever adds one decides.
var scopes = func() map[string]scope {
	local := scope{nowhere, "is about this machine; leave them out"}
	cluster := scope{single, ", and the same at each: it is about the whole cluster"}
	one := scope{single, ""}
	all := scope{many, ""}
	away := scope{single, ", or several would be away at once"}
	m := map[string]scope{
		"apply":         {single, ": documents are one node's"},
		"upgrade":       away,
		"rollback":      away,
		"reboot":        away,
		"shutdown":      away,
		"reset":         {single, ", because what it destroys is gone for ever"},
		"etcd leave":    away,
		"etcd restore":  {single, ", because each would begin a cluster of its own"},
		"etcd defrag":   {single, ", because a member does not answer meanwhile"},
		"unlock":        {nowhere, "goes to the node itself, which knows nobody while it is locked; leave them out, and give its ENDPOINT"},
		"claim":         {nowhere, "goes to the node itself, which belongs to nobody; leave them out"},
		"join":          {nowhere, "goes to the node itself, which belongs to nobody; leave them out"},
		"etcd snapshot": {single, ", and the same at each: it is the whole cluster's data"},
	}
	for s, names := range map[*scope][]string{
		&local: {"up", "down", "status", "lan-switch", "config list", "config show", "config ca", "config path", "config endpoints", "config use", "config remove", "login", "logout",
			"completion bash", "completion zsh", "completion fish", "completion powershell", "help"},
		&cluster: {"bootstrap", "token", "certificate", "kubeconfig", "jointoken create", "jointoken list", "jointoken revoke", "attest allow", "attest list", "attest revoke", "node remove", "revoke", "trust rotate-ca", "trust renew",
			"rolling status", "rolling resume", "rolling abort", "etcd members", "etcd remove", "etcd alarms", "etcd forfeit-leadership"},
		&one: {"secureboot enroll", "storage keys add", "storage keys remove", "storage keys rotate", "storage keys recovery", "etcd rejoin"},
		&all: {"whoami", "version", "health", "services", "service restart", "diff", "get", "why", "mark-good", "storage keys list", "etcd status", "etcd snapshots"},
	} {
		for _, n := range names {
			m[n] = *s
		}
	}
	for _, n := range []string{"logs", "dmesg", "events", "audit"} {
		m[n] = scope{lines, ""}
	}
	return m
}()

// leaves calls f with every command that does something.
func leaves(c *cobra.Command, f func(*cobra.Command)) {
	if c.RunE != nil || c.Run != nil {
		f(c)
	}
	for _, sub := range c.Commands() {
		leaves(sub, f)
	}
}
