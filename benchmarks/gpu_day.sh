#!/usr/bin/env bash
# A GPU day in one command: build, check, measure, in the order of worth, without pip and without a network.
#
#   bash benchmarks/gpu_day.sh OUT [MINUTES] [--dry] [--only build,tails]     # see benchmarks/gpu_day.py
set -euo pipefail
out=${1:?gpu_day.sh: expected a folder for the results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
shift
cd "$(dirname "$0")/.."
exec env PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m benchmarks.gpu_day "$out" "$@"
