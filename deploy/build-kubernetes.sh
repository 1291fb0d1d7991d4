#!/bin/bash
# Builds what a node needs for Kubernetes and is not ours, from the pinned modules in upstream/, and prints the
# folder that holds it as the last line of stdout:
#
#     bin/   kube containerd containerd-shim-runc-v2 ctr runc
#     cni/   bridge host-local loopback portmap
#     images.tar
#
# The folder is named after a hash of everything that goes in, so a second run with the same inputs only prints it.
# BULKHEAD_CACHE moves the cache. Nothing is written into the clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/upstream"

say() { printf 'kubernetes: [%4d s] %s\n' "$SECONDS" "$*" >&2; }
die() { printf 'kubernetes: %s\n' "$*" >&2; exit 1; }

# The environment is part of no build: what matters is set here, and hashed with this file.
export LC_ALL=C TZ=UTC GOOS=linux GOARCH=amd64 GOAMD64=v1 GOWORK=off GOEXPERIMENT='' GODEBUG='' CGO_ENABLED=0
# Debug information would be made for each package, and left out by the linker.
export GOFLAGS='-trimpath -buildvcs=false -mod=readonly -gcflags=all=-dwarf=false'
# The compiler, told nothing, lets its memory grow to 128 MiB first. Where pages are dear to get, as in a machine in a machine, this is a tenth quicker.
export GOGC=200
unset CC CFLAGS CPPFLAGS LDFLAGS CGO_CFLAGS CGO_CPPFLAGS CGO_LDFLAGS PKG_CONFIG_PATH PKG_CONFIG_LIBDIR SOURCE_DATE_EPOCH
umask 022

command -v go >/dev/null || die "Go is missing: install the version that deploy/upstream/runtime/go.mod names, or a newer one"

# runc must join namespaces before the Go runtime starts threads, which takes C, and filters system calls with libseccomp.
packages=(gcc libc6-dev libseccomp-dev pkg-config)
# prints "name version" of the packages that are installed
installed() { dpkg-query -W -f='${db:Status-Abbrev} ${Package} ${Version}\n' "${packages[@]}" 2>/dev/null | sed -n 's/^ii *//p'; }
if [ "$(installed | wc -l)" -lt ${#packages[@]} ]; then
	missing=()
	for p in "${packages[@]}"; do installed | grep -q "^$p " || missing+=("$p"); done
	[ "$(id -u)" = 0 ] || die "missing packages; as root: apt-get install ${missing[*]}"
	say "apt-get install ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get install -y --no-install-recommends "${missing[@]}" >&2 ||
		{ apt-get update >&2 && apt-get install -y --no-install-recommends "${missing[@]}" >&2; }
fi

# hash prints one number for all inputs: this script, the sources, the Go that each module selects, the C side.
hash() {
	{
		find ../build-kubernetes.sh kubernetes runtime dns -type f \
			\( -name '*.go' -o -name '*.c' -o -name '*.sh' -o -name go.mod -o -name go.sum \) ! -name '*_test.go' -print0 |
			sort -z | xargs -0 sha256sum
		for module in kubernetes runtime dns; do (cd "$module" && go version); done
		installed
		dpkg-query -W -f='${Package} ${Version}\n' 'gcc-[0-9]*' binutils 2>/dev/null || true
	} | sha256sum | cut -d' ' -f1
}
key=$(hash)
cache=${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}/kubernetes
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
done_with() {
	ln -sfn "$key" "$cache/current"
	echo "$cache/$key"
	exit 0
}
[ ! -d "$cache/$key" ] || done_with

# One build at a time; whoever waited may find the work done. What lies in .build-* under the lock was interrupted.
exec 9>"$cache/.lock"
flock -n 9 || { say "another build is running; waiting for it"; flock 9; }
[ ! -d "$cache/$key" ] || done_with
rm -rf "$cache"/.build-*
out=$(mktemp -d "$cache/.build-XXXXXX")
trap 'rm -rf "$out"' EXIT
mkdir "$out/bin" "$out/cni" "$out/images"

# version MODULE PATH prints the version of PATH that a go.mod pins.
version() { awk -v path="$2" '$1 == "require" { $1 = ""; $0 = $0 } $1 == path { print $2; exit }' "$1/go.mod"; }

# build MODULE OUTPUT TAGS LDFLAGS PACKAGE
build() {
	say "${2##*/}"
	(cd "$1" && go build -tags "$3" -ldflags "-s -w -buildid= $4" -o "$out/$2" "$5")
}

say "building into $cache/$key; on two cores and from nothing: some ten minutes"

containerd=github.com/containerd/containerd/v2
stamp="-X $containerd/version.Version=$(version runtime $containerd)"
# Left out: snapshotters for file systems that the image lacks, exporters of traces, generators of man pages, and of gRPC
# what reaches methods by name, which keeps the linker from dropping any. The shim speaks ttrpc only.
tags=netgo,osusergo,static_build,no_zfs,no_devmapper,no_tracing,urfave_cli_no_docs,grpcnotrace
build runtime bin/containerd $tags "$stamp" $containerd/cmd/containerd
build runtime bin/containerd-shim-runc-v2 $tags,no_grpc "$stamp" $containerd/cmd/containerd-shim-runc-v2
build runtime bin/ctr $tags "$stamp" $containerd/cmd/ctr

# A static position-independent program, as upstream's; without CRIU, which the image does not have.
CGO_ENABLED=1 GOFLAGS="$GOFLAGS -buildmode=pie" build runtime bin/runc \
	seccomp,netgo,osusergo,urfave_cli_no_docs,runc_nocriu "-linkmode external -extldflags -static-pie" github.com/opencontainers/runc

plugins=github.com/containernetworking/plugins
stamp="-X $plugins/pkg/utils/buildversion.BuildVersion=$(version runtime $plugins)"
for p in main/bridge ipam/host-local main/loopback meta/portmap; do
	build runtime "cni/${p##*/}" netgo,osusergo "$stamp" "$plugins/plugins/$p"
done

say pause
gcc -std=gnu11 -Os -Wall -Wextra -Werror -static -s -Wl,--build-id=none -o "$out/images/pause" runtime/pause/pause.c
build runtime images/hello netgo,osusergo "" ./hello
build dns images/coredns netgo,osusergo,grpcnotrace "" .
build runtime images/mkoci "" "" ./mkoci
say images.tar
"$out/images/mkoci" "$out/images.tar" \
	bulkhead.dev/pause:1="$out/images/pause" \
	bulkhead.dev/coredns:"$(version dns github.com/coredns/coredns)"="$out/images/coredns" \
	bulkhead.dev/hello:1="$out/images/hello"
rm -r "$out/images"

# Without a version a node calls itself v0.0.0-master. The release's commit is not in the module: left empty.
v=$(version kubernetes k8s.io/kubernetes)
IFS=. read -r major minor _ <<<"${v#v}"
stamp=
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	stamp+=" -X $p.gitVersion=$v -X $p.gitMajor=$major -X $p.gitMinor=$minor -X $p.gitCommit= -X $p.gitTreeState=clean"
done
build kubernetes bin/kube grpcnotrace,notest "$stamp" ./kube

chmod 755 "$out"
sync "$out"/bin/* "$out"/cni/* "$out/images.tar"
mv -T "$out" "$cache/$key"
say "done: $(du -sh "$cache/$key" | cut -f1)"
done_with
