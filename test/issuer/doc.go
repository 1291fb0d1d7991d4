// Package issuer signs in at a certified OpenID Connect implementation that is not ours, through the doors of a node that is: trustd, apid and gateway as
// they are.
//
// It is a module of its own, so that what that implementation needs is in no go.mod of ours. "make test" runs it.
package issuer
