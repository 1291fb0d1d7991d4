#!/bin/sh
# Installs the tools that building and running need and that are missing, by package name. Says so, and does nothing else.
set -eu
need() { # need COMMAND PACKAGE
	command -v "$1" >/dev/null 2>&1 || PATH=$PATH:/sbin:/usr/sbin command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
missing=
need qemu-system-x86_64 qemu-system-x86
need mksquashfs squashfs-tools
need xz xz-utils
need gcc gcc
need curl curl
need veritysetup cryptsetup-bin
need sgdisk gdisk
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
command -v go >/dev/null 2>&1 || { echo "setup: Go is missing: install the version that go.mod names" >&2; exit 1; }
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null 2>&1 || { echo "setup: install what provides:$missing" >&2; exit 1; }
echo "setup: apt-get install$missing"
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
# shellcheck disable=SC2086 # a list
$sudo apt-get install -y --no-install-recommends $missing
