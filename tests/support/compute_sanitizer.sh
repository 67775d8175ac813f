#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the GPU tests of the CUDA kernels: out-of-bounds and misaligned accesses, races in
# shared memory, uninitialised global memory, wrong barriers. Needs a GPU and the CUDA toolkit.
#
#   tests/support/compute_sanitizer.sh                 # all four tools on the conformance problems and the artifacts
#   tests/support/compute_sanitizer.sh memcheck -k odd # one tool, and any arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/../.."

tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ ! -x "$tool" ]; then
  echo "compute-sanitizer: expected it on PATH or in CUDA_HOME/bin, found none; it comes with the CUDA toolkit" >&2
  exit 1
fi
tools=(memcheck racecheck initcheck synccheck)
if [ $# -gt 0 ]; then
  tools=("$1")
  shift
fi
select=("$@")
[ ${#select[@]} -gt 0 ] || select=(-k "test_conformance or test_artifacts or test_split_k or test_pass")

# torch's caching allocator hands out pieces of large blocks, inside which nothing is out of bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
for name in "${tools[@]}"; do
  echo "== $name"
  # The kernels' symbols begin with conv_ or bn_: what other libraries launch is not ours to judge.
  "$tool" --tool "$name" --kernel-name "regex=^(conv|bn)_" --error-exitcode 99 --target-processes all \
    "$python" -m pytest -q -p no:xdist -m gpu tests/cuda/test_gpu_cuda.py tests/cuda/test_gpu_training.py "${select[@]}"
done
