#!/usr/bin/env bash
# All that only a machine with an NVIDIA GPU can say, in one command: build there, tests, compute-sanitizer, benchmarks.
#
#   bench/gpu_session.sh                     # everything
#   bench/gpu_session.sh build test          # some steps; a later call needs `build` again only on a fresh machine
#
# Steps: build test memcheck racecheck bench. A step that fails does not stop the rest; the exit status is their number.
# Needs: PYTHON (default python3) with a CUDA build of torch >= 2.11, pytest, hypothesis, ninja, pybind11; nvcc;
# compute-sanitizer. Results and session.txt go to ${OUT:-bench/results}/<gpu name>/.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${OUT:-bench/results}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu_session: $python has no torch that sees a CUDA device" >&2; exit 100; }
folder=$results/$("$python" -c 'from bench.harness import device_directory; print(device_directory("cuda"))')
mkdir -p "$folder"
log=$folder/session.txt

export WNKERNELS_CUDA=1
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}

failures=0
run() { # NAME COMMAND...: runs the command, notes its status, time and last lines
  local name=$1 started=$SECONDS status output
  shift
  echo "== $name: $*"
  output=$(mktemp)
  "$@" 2>&1 | tee "$output"
  status=$?
  { echo "== $name: exit $status after $((SECONDS - started)) s: $*"; tail -n 15 "$output"; echo; } >>"$log"
  rm -f "$output"
  [ "$status" -eq 0 ] || failures=$((failures + 1))
}

build() {
  run build "$python" -m pip install --no-build-isolation --no-deps -e .
  run info "$python" -m wnkernels info
}

test() { run test "$python" -m pytest -q; }

# Allocations of their own instead of pieces of torch's pool, so that an access beyond a tensor is seen.
sanitize() { # TOOL
  run "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all "$python" -m pytest -q -x -m cuda tests
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

bench() {
  run kernels "$python" -m bench.kernels --device cuda --seconds 2 --out "$results"
  run layers "$python" -m bench.layers --device cuda --forced --seconds 2 --out "$results"
  run optimizers "$python" -m bench.optimizers --device cuda --seconds 2 --out "$results"
  in_backward=("$python" -m bench.in_backward --device cuda --widths 1024 4096 16384 --batches 16 128 1024 8192
    --autocast-batches 16 1024 --seconds 2 --out "$results")
  run in_backward "${in_backward[@]}"
  run in_backward_device "${in_backward[@]}" --hide-launch --memory-width 0 --name in_backward_device
  run models "$python" -m bench.models --device cuda --seconds 2 --out "$results"
  run overhead "$python" -m bench.overhead --device cuda --seconds 3 --out "$results"
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 1
  "$python" -c 'import torch; print("torch", torch.__version__)'
  git log -1 --format='commit %h %cd' 2>/dev/null
  echo
} >"$log" 2>&1

for step in "${@:-build test memcheck racecheck bench}"; do
  for name in $step; do
    case $name in
      build | test | memcheck | racecheck | bench) "$name" ;;
      *) echo "gpu_session: no step '$name'; steps: build test memcheck racecheck bench" >&2; exit 100 ;;
    esac
  done
done
echo "$failures failed; written: $folder"
exit "$failures"
