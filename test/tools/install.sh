#!/bin/sh
# Puts the judges of test/machine into out/tools: promtool (Debian), grpcurl (Go), validate-api (npm). Nothing is installed outside the clone.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p out/tools/bin
if [ ! -x out/tools/bin/promtool ]; then
	echo "tools: promtool"
	dir=$(mktemp -d)
	trap 'rm -rf "$dir"' EXIT
	chmod 755 "$dir"
	(cd "$dir" && apt-get download prometheus >/dev/null 2>&1) || { apt-get update -qq && (cd "$dir" && apt-get download prometheus >/dev/null); }
	dpkg-deb -x "$dir"/prometheus_*.deb "$dir/x"
	install -m 755 "$dir/x/usr/bin/promtool" out/tools/bin/promtool
fi
if [ ! -x out/tools/bin/grpcurl ]; then
	echo "tools: grpcurl"
	GOBIN=$PWD/out/tools/bin CGO_ENABLED=0 go install -trimpath github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4
fi
if [ ! -e out/tools/node_modules/.bin/validate-api ]; then
	echo "tools: validate-api"
	command -v npm >/dev/null || apt-get install -y --no-install-recommends npm >/dev/null
	cp test/tools/package.json out/tools/
	npm install --prefix out/tools --no-audit --no-fund --silent
fi
