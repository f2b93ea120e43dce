#!/usr/bin/env bash
# Makes a Linux guest out of Debian packages: kernel and initramfs, no root file system.
#
#   bench/guests.sh [FOLDER]      default target/guests
#
# In FOLDER: vmlinuz (Debian's cloud kernel, unmodified), initrd.cpio.gz (busybox, guest/init, guest/work.c),
# work (the same program for the host), versions.txt. What is there already is not made again.
#
# Needs apt-get, dpkg-deb, gcc and python3. Package lists and downloads stay in FOLDER; nothing is installed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../target/guests}
suite=${SUITE:-bookworm}
mkdir -p "$out"/{debs,apt/lists/partial,apt/cache/archives/partial}
out=$(cd "$out" && pwd)

# apt-get with its state in FOLDER and the machine's own package sources.
: > "$out/apt/status"
private=(-o Dir::State::Lists="$out/apt/lists" -o Dir::Cache="$out/apt/cache" -o Dir::State::Status="$out/apt/status"
	-o APT::Sandbox::User=root -o APT::Architecture=amd64 -o APT::Architectures=amd64
	-o APT::Default-Release="$suite" -o Acquire::Retries=3)

updated=
update() {
	[ -n "$updated" ] || apt-get "${private[@]}" -qq update
	updated=1
}

# Unpacks a package into FOLDER/tree-NAME, downloading it unless it is there.
package() { # NAME
	local name=$1
	if ! compgen -G "$out/debs/${name}_*.deb" > /dev/null; then
		update
		(cd "$out/debs" && apt-get "${private[@]}" -qq download "$name")
	fi
	rm -rf "$out/tree-$name"
	dpkg-deb -x "$out/debs/${name}"_*.deb "$out/tree-$name"
	dpkg-deb -W --showformat '${Package} ${Version} ${Architecture}\n' "$out/debs/${name}"_*.deb >> "$out/versions.txt"
}

kernel() {
	local name
	update
	name=$(apt-cache "${private[@]}" depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
	[ -n "$name" ] || { echo "guests.sh: the package sources offer no linux-image-cloud-amd64 in $suite" >&2; exit 1; }
	package "$name"
	cp "$out/tree-$name"/boot/vmlinuz-* "$out/vmlinuz"
	rm -rf "$out/tree-$name"
}

initramfs() {
	local root=$out/root
	package busybox-static
	rm -rf "$root"
	mkdir -p "$root"/{bin,dev,proc,sys,tmp}
	cp "$out/tree-busybox-static/bin/busybox" "$root/bin/busybox"
	for applet in sh cat echo ls mount poweroff tr uname; do
		ln -s busybox "$root/bin/$applet"
	done
	cp "$out/work" "$root/bin/work"
	cp "$here/guest/init" "$root/init"
	chmod 755 "$root/init" "$root/bin/work"
	python3 "$here/initramfs.py" "$root" "$out/initrd.cpio.gz"
	rm -rf "$out/tree-busybox-static" "$root"
}

newer() { # FILE SOURCE...: whether FILE is missing or older than a source
	local file=$1 source
	shift
	[ -e "$file" ] || return 0
	for source; do
		[ "$source" -nt "$file" ] && return 0
	done
	return 1
}

if newer "$out/vmlinuz"; then
	kernel
fi
if newer "$out/work" "$here/guest/work.c"; then
	gcc -O2 -ffp-contract=off -static -o "$out/work" "$here/guest/work.c"
fi
if newer "$out/initrd.cpio.gz" "$out/work" "$here/guest/init" "$here/initramfs.py" "$here/guests.sh"; then
	initramfs
fi
sort -u -o "$out/versions.txt" "$out/versions.txt"
cat "$out/versions.txt"
