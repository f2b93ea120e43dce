#!/usr/bin/env bash
# Plants bugs one at a time (cfg umbra_mutant) and says how long `umbra diff` takes to find each and how small it
# makes the case. Exit code 1 if one isn't found within a minute.
#
#   fuzz/planted.sh [FOLDER]      default: target/planted; cases and images are left there
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
folder=${1:-$target/planted}
mkdir -p "$folder"
failed=0

plant() { # NAME ENGINES GENERATOR
	# Workspace members only: what they depend on is built once for all. Cargo keeps their artifacts apart by the
	# wrapper's path.
	local wrapper
	wrapper=$(realpath "$folder")/rustc-$1
	printf '#!/bin/sh\nexec "$@" --cfg %s\n' "'umbra_mutant=\"$1\"'" > "$wrapper"
	chmod +x "$wrapper"
	RUSTC_WORKSPACE_WRAPPER=$wrapper cargo build ${PROFILE:+--profile "$PROFILE"} --quiet -p umbra-vm
	local start=$SECONDS rc=0
	rm -rf "${folder:?}/$1"
	mkdir "$folder/$1"
	timeout 60 "$target/${OUTPUT:-debug}/umbra" diff --engines "$2" --generator "$3" --cases 100000000 \
		--save "$folder/$1" > "$folder/$1/output" 2>&1 || rc=$?
	local seconds=$((SECONDS - start))
	if [ "$rc" -ne 1 ] || ! ls "$folder/$1"/*.toml > /dev/null; then
		echo "$1: NOT FOUND by $3 on $2 (exit code $rc after $seconds s)"
		failed=1
		return
	fi
	echo "$1: found by $3 on $2, with its five cases minimised after $seconds s; the smallest:"
	local steps smallest=
	for case in "$folder/$1"/*.toml; do
		steps=$(grep -c '^\[\[step\]\]' "$case")
		if [ -z "$smallest" ] || [ "$steps" -lt "$smallest" ]; then
			smallest=$steps
			best=$case
		fi
	done
	grep -E '^(difference|text) = ' "$best" | sed 's/^/    /'
}

plant wp-ignored-for-large-pages interp,model shapes
plant implicit-accesses-obey-ac interp,model shapes
plant daa-clears-af interp,host rows
exit $failed
