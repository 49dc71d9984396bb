#!/bin/sh
# Builds a static fio for the containers of the benchmark, which have no libraries,
# from the source package of the machine's own Debian release:
#
#	build-fio.sh OUT
#
# OUT.stamp records what OUT was built from: with the same source version, static
# libraries and script, OUT is kept. Missing build dependencies are installed, which
# needs root.
set -eu

die() {
	echo "build-fio: $*" >&2
	exit 1
}

[ $# -eq 1 ] || die "usage: build-fio.sh OUT"
mkdir -p "$(dirname "$1")"
out=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
source=$(dirname "$0")/../../scripts/debian-source

linked="libaio-dev libc6-dev zlib1g-dev"
# shellcheck disable=SC2086 # a list of words
version=$("$source" version fio dpkg-dev gcc make pkg-config $linked)

# shellcheck disable=SC2086 # a list of words
stamp=$(
	echo "fio $version"
	dpkg-query -W $linked gcc
	echo "script $(sha256sum <"$0")"
)
if [ -x "$out" ] && [ "$(cat "$out.stamp" 2>/dev/null)" = "$stamp" ]; then
	touch "$out"
	exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$work" # apt downloads as its own user
mkdir "$work/src"
"$source" fetch fio "$version" "$work/src"
src=$(echo "$work"/src/fio-*/)
src=${src%/}

# For any x86-64 and any container: no code of this machine's CPU, no shared memory
# of System V. What engines for other storage need is left out, installed or not.
SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -l "$src/debian/changelog" -S Timestamp)
export SOURCE_DATE_EPOCH LC_ALL=C
(
	cd "$src"
	./configure --build-static --disable-native --disable-shm --disable-lex --disable-tcmalloc \
		--disable-dfs --disable-gfapi --disable-http --disable-libnfs --disable-libzbc --disable-numa \
		--disable-pmem --disable-rados --disable-rbd --disable-rdma --disable-xnvme \
		--extra-cflags="-ffile-prefix-map=$src=."
	make -j"$(nproc)" fio
) >"$work/log" 2>&1 || {
	grep -E 'error:|\*\*\*' "$work/log" >&2 || tail -n 40 "$work/log" >&2
	die "cannot build fio $version"
}
strip -o "$work/fio" "$src/fio"
"$work/fio" --enghelp | grep -qw libaio || die "fio $version was built without libaio"

install -m 755 "$work/fio" "$out.new"
mv "$out.new" "$out"
echo "$stamp" >"$out.stamp"
