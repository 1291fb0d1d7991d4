// Package config is the document: its types, and pure functions that parse, validate, default, write and compare it.
//
// It is used by bhctl, by the image builder and by every daemon, so that one text means one thing everywhere.
// It does no I/O and must not know any daemon.
package config
