#!/usr/bin/env bash
# Fuzzes a target for a total time, unattended and resumable: corpus, time spent and log stay in FOLDER, and starting
# it again continues until the total is reached. Stops at the first finding, exit code 1.
#
#   fuzz/soak.sh [TARGET [SECONDS [FOLDER]]]      default: decode_execute 3600 target/fuzz/TARGET
#
# Environment: TIMEOUT, seconds after which an input counts as a hang (default 20; more on a busy machine).
set -euo pipefail

target=${1:-decode_execute}
total=${2:-3600}
cd "$(dirname "$0")/.."
folder=${3:-target/fuzz/$target}
mkdir -p "$folder"/{corpus,artifacts}
folder=$(cd "$folder" && pwd)
log=$folder/log

# Seconds fuzzed so far; being killed loses at most one step.
spent() {
	cat "$folder/seconds" 2> /dev/null || echo 0
}

flags=(-s none)
case $target in
# Telling the fuzzer of each comparison is most of the work of targets that run machines (5/6 of hostile_guest's), and finds
# nothing: their input has no magic numbers.
hostile_guest | device_io | snapshot) flags+=(--no-trace-compares) ;;
esac
cargo +nightly fuzz build "$target" "${flags[@]}" >> "$log" 2>&1
seeds=() dictionary=()
[ ! -d "fuzz/seeds/$target" ] || seeds=("fuzz/seeds/$target")
[ ! -e "fuzz/dictionaries/$target.dict" ] || dictionary=("-dict=fuzz/dictionaries/$target.dict")
step=300
while [ "$(spent)" -lt "$total" ]; do
	left=$((total - $(spent)))
	now=$((left < step ? left : step))
	if ! cargo +nightly fuzz run "$target" "${flags[@]}" "$folder/corpus" "${seeds[@]}" -- -max_total_time="$now" -timeout="${TIMEOUT:-20}" \
		"${dictionary[@]}" \
		-rss_limit_mb=4096 -print_final_stats=1 -artifact_prefix="$folder/artifacts/" >> "$log" 2>&1; then
		echo "finding after $(spent) s; see $log and $folder/artifacts"
		exit 1
	fi
	echo $(($(spent) + now)) > "$folder/seconds"
	echo "$(date -u +%FT%TZ) $(spent) of $total s without a finding" | tee -a "$log"
done
