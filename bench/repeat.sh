#!/usr/bin/env bash
# Runs one guest N times with 1 and N times with 4 CPUs, every second run under host load: serial bytes and every
# counter must be the same each time. Resumable: results stay in FOLDER, and runs that are there aren't made again.
#
#   bench/repeat.sh [N [FOLDER]]      default 2 target/repeat; exit code 1 on the first difference
#
# Environment: UMBRA (default: the release build), KERNEL, INITRD, APPEND, MEMORY (default: what bench/guests.sh makes).
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
runs=${1:-2}
folder=${2:-$here/target/repeat}
umbra=${UMBRA:-${CARGO_TARGET_DIR:-$here/target}/release/umbra}
kernel=${KERNEL:-$here/target/guests/vmlinuz}
initrd=${INITRD:-$here/target/guests/initrd.cpio.gz}
append=${APPEND:-console=ttyS0 bench=sieve,hash,pipe,fork scale=1}
memory=${MEMORY:-256M}
mkdir -p "$folder"

# Results of another program or guest are no comparison.
key=$(cat "$umbra" "$kernel" "$initrd" | sha256sum | cut -c1-16)-$(echo "$append $memory" | sha256sum | cut -c1-8)

load=()
start_load() {
	local cpu
	for ((cpu = 0; cpu < $(nproc); cpu++)); do
		(while :; do :; done) &
		load+=($!)
	done
}
stop_load() {
	[ ${#load[@]} -eq 0 ] || kill "${load[@]}" 2> /dev/null || true
	load=()
}
trap stop_load EXIT

# One run: a line with the serial bytes' digest, and the report without the host's time.
run() { # NAME SMP
	local out=$folder/$1 rc=0
	"$umbra" run --kernel "$kernel" --initrd "$initrd" --append "$append" --memory "$memory" --smp "$2" --json \
		--timeout 3600 < /dev/null > "$out.serial" 2> "$out.json" || rc=$?
	if [ "$rc" -ne 0 ]; then
		tail -n 5 "$out.serial" "$out.json"
		echo "$1: exit code $rc"
		exit 1
	fi
	{
		echo "serial $(sha256sum < "$out.serial" | cut -d' ' -f1) $(wc -c < "$out.serial") bytes"
		sed -E 's/"host_seconds":[0-9.e-]+,//' "$out.json"
	} > "$out.tmp"
	mv "$out.tmp" "$out.result"
}

for smp in 1 4; do
	first=
	for ((i = 1; i <= runs; i++)); do
		name=$key-smp$smp-$i
		if [ ! -e "$folder/$name.result" ]; then
			[ $((i % 2)) -eq 1 ] || start_load
			run "$name" "$smp"
			stop_load
		fi
		first=${first:-$name}
		if ! cmp -s "$folder/$first.result" "$folder/$name.result"; then
			diff "$folder/$first.result" "$folder/$name.result" || true
			echo "--smp $smp: run $i differs from the first; see $folder/$name.serial"
			exit 1
		fi
	done
	echo "--smp $smp: $runs runs, $((runs / 2)) of them under load: $(head -n 1 "$folder/$first.result")," \
		"$(grep -oE '"(guest_ns|retired)":[0-9]+' "$folder/$first.result" | tr '\n' ' ')"
done
