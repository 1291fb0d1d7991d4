#!/bin/sh
# Installs the tools that building, running and testing need and that are missing, by package name. Says so, and does nothing else.
set -eu
missing=
need() { # need COMMAND PACKAGE
	PATH=$PATH:/sbin:/usr/sbin command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
fail() { echo "setup: $1" >&2; exit 1; }

command -v go >/dev/null 2>&1 || fail "Go is missing: install the version that go.mod names"
# to build and to run
need qemu-system-x86_64 qemu-system-x86
need mksquashfs squashfs-tools
need xz xz-utils
need gcc gcc
need git git
need mkfs.vfat dosfstools
need mcopy mtools
need qemu-img qemu-utils
need xorriso xorriso
need swtpm swtpm
[ -e /usr/share/OVMF/OVMF_CODE_4M.secboot.fd ] || missing="$missing ovmf"
# to test: the programs that judge ours
need curl curl
need openssl openssl
need iptables iptables
need mkfs.ext4 e2fsprogs
need veritysetup cryptsetup-bin
need swtpm swtpm
need tpm2_pcrread tpm2-tools
need sgdisk gdisk
need sbverify sbsigntool
need tpm2_pcrread tpm2-tools
need cpio cpio
ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || missing="$missing libfaketime"
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
[ -n "$missing" ] || exit 0

command -v apt-get >/dev/null 2>&1 || fail "install what provides:$missing"
sudo=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null 2>&1 || fail "as root, once: apt-get install$missing"
	sudo=sudo
fi
echo "setup: apt-get install$missing"
install() { $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing >/dev/null 2>&1; } # a list
install || { $sudo apt-get update -qq >/dev/null 2>&1 || fail "the package mirror does not answer: check the network and /etc/apt/sources.list*"; install; } ||
	fail "apt-get cannot install$missing: try it by hand to see why"
