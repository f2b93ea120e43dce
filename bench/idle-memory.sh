#!/usr/bin/env bash
# What an idle guest costs in host memory besides the pages it wrote: boots a kernel to a prompt that waits for ever, and
# compares the process's resident memory with the guest's count at the end.
#
#   bench/idle-memory.sh [LIMIT_MIB [SECONDS]]      default 64 120; exit code 1 above the limit
#
# SECONDS must be enough to boot. Environment: UMBRA, KERNEL, INITRD, APPEND as in bench/repeat.sh, READY (default
# @@INIT), MEMORY (default 256M).
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
limit=${1:-64}
seconds=${2:-120}
umbra=${UMBRA:-${CARGO_TARGET_DIR:-$here/target}/release/umbra}
kernel=${KERNEL:-$here/target/guests/vmlinuz}
initrd=${INITRD:-$here/target/guests/initrd.cpio.gz}
append=${APPEND:-console=ttyS0 shell}
ready=${READY:-@@INIT}
memory=${MEMORY:-256M}

folder=$(mktemp -d)
out=$folder/out
# An open pipe that says nothing: the shell waits, and the CPU halts.
mkfifo "$folder/stdin"
exec 3<> "$folder/stdin"
"$umbra" run --kernel "$kernel" --initrd "$initrd" --append "$append" --memory "$memory" --serial-stdin --clock real \
	--timeout "$seconds" --json <&3 > "$out" 2> "$folder/report" &
pid=$!
trap 'kill "$pid" 2> /dev/null || true; rm -rf "$folder"' EXIT
resident=
while kill -0 "$pid" 2> /dev/null; do
	now=$(awk '/^VmRSS:/ { print $2 }' "/proc/$pid/status" 2> /dev/null || true)
	resident=${now:-$resident}
	sleep 0.5
done
grep -q "$ready" "$out" || { tail "$out" "$folder/report"; exit 1; }
written=$(grep -oE '"written_bytes":[0-9]+' "$folder/report" | cut -d: -f2)
rest=$((resident - written / 1024))
echo "resident $resident KiB, guest pages written $((written / 1024)) KiB, the rest $rest KiB (at most $((limit << 10)))"
[ "$rest" -le $((limit << 10)) ]
