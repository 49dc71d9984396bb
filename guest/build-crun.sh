#!/bin/sh
# Builds a static crun for the guest from the source package of the machine's
# own Debian release:
#
#	build-crun.sh OUT
#
# OUT.stamp records what OUT was built from: with the same source version, static
# libraries and script, OUT is kept. Missing build dependencies are installed, which
# needs root.
set -eu

die() {
	echo "build-crun: $*" >&2
	exit 1
}

[ $# -eq 1 ] || die "usage: build-crun.sh OUT"
mkdir -p "$(dirname "$1")"
out=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")

source=$(dirname "$0")/../scripts/debian-source

linked="libc6-dev libcap-dev libseccomp-dev libyajl-dev"
# shellcheck disable=SC2086 # a list of words
version=$("$source" version crun autoconf automake dpkg-dev gcc libtool make pkg-config python3 $linked)

# shellcheck disable=SC2086 # a list of words
stamp=$(
	echo "crun $version"
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
"$source" fetch crun "$version" "$work/src"
src=$(echo "$work"/src/crun-*/)
src=${src%/}

# Debian names the static yajl apart from the shared one; configure wants -lyajl.
libdir=$(dirname "$(dpkg -L libyajl-dev | grep '/libyajl_s\.a$')")
mkdir "$work/lib"
ln -s "$libdir/libyajl_s.a" "$work/lib/libyajl.a"

SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -l "$src/debian/changelog" -S Timestamp)
export SOURCE_DATE_EPOCH LC_ALL=C
(
	cd "$src"
	./configure --disable-systemd --disable-criu --disable-dl --disable-shared --enable-static \
		CFLAGS="-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2 -ffile-prefix-map=$src=." \
		LDFLAGS="-static -L$work/lib"
	make -j"$(nproc)" LDFLAGS="-static -all-static -L$work/lib"
) >"$work/log" 2>&1 || {
	grep -E 'error:|\*\*\*' "$work/log" >&2 || tail -n 40 "$work/log" >&2
	die "cannot build crun $version"
}
strip -o "$work/crun" "$src/crun"
for feature in SECCOMP EBPF CAP YAJL; do
	"$work/crun" --version | grep -q "+$feature" || die "crun $version was built without $feature"
done

install -m 755 "$work/crun" "$out.new"
mv "$out.new" "$out"
echo "$stamp" >"$out.stamp"
