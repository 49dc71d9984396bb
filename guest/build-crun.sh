#!/bin/sh
# Builds a static crun for the guest from the source package of the machine's
# own Debian release:
#
#	build-crun.sh OUT
#
# The source comes through apt from the machine's configured package sources, so
# apt's signatures and checksums vouch for it; the machine's apt configuration
# and lists are left alone. OUT.stamp records what OUT was built from: with the
# same source version, static libraries and script, OUT is kept.
# Missing build dependencies are installed, which needs root.
set -eu

die() {
	echo "build-crun: $*" >&2
	exit 1
}

[ $# -eq 1 ] || die "usage: build-crun.sh OUT"
mkdir -p "$(dirname "$1")"
out=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")

deps="autoconf automake dpkg-dev gcc libc6-dev libcap-dev libseccomp-dev libtool libyajl-dev make pkg-config python3"
linked="libc6-dev libcap-dev libseccomp-dev libyajl-dev"

installed() {
	[ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# The source version behind the crun that this machine would install: the
# candidate without the suffix of a binary-only rebuild. Empty without lists.
source_version() {
	LC_ALL=C apt-cache policy crun | sed -n 's/^  Candidate: //p' | grep -vx '(none)' | sed 's/+b[0-9]*$//'
}

missing=
for dep in $deps; do
	installed "$dep" || missing="$missing $dep"
done
version=$(source_version)
if [ -n "$missing" ] || [ -z "$version" ]; then
	[ "$(id -u)" -eq 0 ] || die "install the build dependencies first, as root: apt-get update && apt-get install$missing"
	apt-get -q update
	# shellcheck disable=SC2086 # a list of words
	[ -z "$missing" ] || DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=300 install --no-install-recommends $missing
	version=$(source_version)
	[ -n "$version" ] || die "no package named crun in the machine's package sources: add Debian's main component"
fi

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
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/sources.list.d" "$work/src"
[ "$(id -u)" -ne 0 ] || chown _apt "$work/src"

# The machine's package sources as source-package sources, in both of apt's forms.
eval "$(apt-config shell etc Dir::Etc/d main Dir::Etc::sourcelist/f parts Dir::Etc::sourceparts/d)"
for file in "$main" "$parts"/*.list; do
	[ ! -f "$file" ] || sed -nE 's/^[[:space:]]*deb(-src)?([[:space:]])/deb-src\2/p' "$file"
done | sort -u >"$work/sources.list"
for file in "$parts"/*.sources; do
	[ ! -f "$file" ] || sed -E 's/^Types:.*/Types: deb-src/I' "$file" >"$work/sources.list.d/$(basename "$file")"
done

apt() {
	tool=$1
	shift
	"$tool" -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts="$work/sources.list.d" \
		-o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
		-o APT::Get::AllowUnauthenticated=false -o Acquire::AllowInsecureRepositories=false \
		-o APT::Update::Post-Invoke-Success= -o APT::Update::Post-Invoke= "$@"
}

# A foreign source without source packages is no obstacle: what counts is crun's.
apt apt-get update >"$work/log" 2>&1 || true
(cd "$work/src" && apt apt-get source --only-source "crun=$version") >>"$work/log" 2>&1 || {
	cat "$work/log" >&2
	die "cannot fetch the source of crun $version: check that the machine's package sources offer source packages"
}
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
