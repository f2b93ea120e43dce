#!/usr/bin/env bash
# All fuzz targets and all generators of `umbra diff` in turns, unattended and resumable: everything stays in FOLDER, and
# starting it again continues until every one has had its share of HOURS. Stops at the first finding, exit code 1.
#
#   fuzz/campaign.sh FOLDER HOURS
set -euo pipefail
folder=${1:?give a folder for the results}
hours=${2:?give a number of hours}
mkdir -p "$folder"/{diff,fuzz}
folder=$(realpath "$folder")
cd "$(dirname "$0")/.."

cargo build --release -p umbra-vm
umbra=$(realpath "${CARGO_TARGET_DIR:-target}/release/umbra")
mapfile -t targets < <(sed -n 's/^name = "\(.*\)"$/\1/p' fuzz/Cargo.toml | grep -v umbra)
comparisons=("interp,host rows 2000000" "interp,jit programs 200000" "interp,model shapes 500000"
	"interp,interp-unload,interp-drop,interp-kvm-role control 50000")
fuzzing=true
if ! cargo +nightly fuzz --version > /dev/null 2>&1; then
	echo "SKIPPED: all fuzz targets: no nightly toolchain with cargo-fuzz (rustup toolchain install nightly; cargo install cargo-fuzz)"
	fuzzing=false
fi

# Seconds spent in earlier runs count.
spent() {
	cat "$folder/seconds" 2> /dev/null || echo 0
}

round=$(cat "$folder/round" 2> /dev/null || echo 0)
while [ "$(spent)" -lt $((hours * 3600)) ]; do
	start=$SECONDS
	for comparison in "${comparisons[@]}"; do
		read -r engines generator cases <<< "$comparison"
		result=$folder/diff/$engines-$generator-$round.json
		[ -e "$result" ] && continue
		if ! "$umbra" diff --engines "$engines" --generator "$generator" --seed $((1000 + round)) --cases "$cases" \
			--save "$folder/diff" --json "$result" > "$folder/diff/last" 2>&1; then
			cat "$folder/diff/last"
			exit 1
		fi
		sed -n 2,3p "$folder/diff/last" | sed "s/^/$engines $generator: /"
	done
	if $fuzzing; then
		for target in "${targets[@]}"; do
			# 300 more seconds of each.
			fuzz/soak.sh "$target" $(((round + 1) * 300)) "$folder/fuzz/$target"
		done
	fi
	echo $(($(spent) + SECONDS - start)) > "$folder/seconds"
	round=$((round + 1))
	echo "$round" > "$folder/round"
done
