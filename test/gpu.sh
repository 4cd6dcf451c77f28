#!/usr/bin/env bash
# Tests the high-throughput mode on the GPUs that are visible: the conformance suite, with ranks that
# are processes and ranks that are threads, and a small case under compute-sanitizer, if that is on
# the PATH. Ranks beyond the number of GPUs share them.
#
#   test/gpu.sh PYTHON [arguments of pytest]
#
# PYTHON is an interpreter with the wheel, Torch with CUDA, CuPy, JAX with CUDA, ml_dtypes, pytest,
# pytest-timeout and hypothesis installed. Slow tests are left out; -m '' takes them in.
set -euo pipefail

# The link itself, not what it points to: a virtual environment is found by it.
python=$(realpath --no-symlinks "$(command -v "${1:?usage: test/gpu.sh PYTHON [arguments of pytest]}")")
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."


"$python" - <<'PROGRAM'
import mscclpp_ep, torch
assert torch.cuda.is_available(), "Torch finds no GPU"
count = mscclpp_ep._core.cuda_device_count()
assert count > 0, "mscclpp_ep finds no GPU, or was built without CUDA"
print(f"mscclpp_ep {mscclpp_ep.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}")
for gpu in range(count):
    print(f"GPU {gpu}: {torch.cuda.get_device_name(gpu)}")
PROGRAM

suites=()
for name in api layout dispatch combine cached values worst_tokens epochs errors groups lifetime \
    failures properties soak; do
    suites+=("test/python/conformance/test_$name.py")
done

summary=()
status=0

# phase NAME COMMAND...: runs a command and remembers how it ended.
phase() {
    local name=$1 start=$SECONDS result=passed
    shift
    printf '\n== %s\n' "$name"
    "$@" || {
        result="FAILED with $?"
        status=1
    }
    summary+=("$(printf '%-28s %s, %d s' "$name" "$result" $((SECONDS - start)))")
}

# suite SELECTION [arguments]: runs the tests that a -k expression selects.
# shellcheck disable=SC2329  # phase calls it
suite() {
    local selection=$1
    shift
    "$python" -m pytest --backend cuda -q -m 'not slow' -k "$selection" "${suites[@]}" "$@"
}

# A GPU has queues for a few hundred connections, and the pools of ranks live side by side.
CUDA_DEVICE_MAX_CONNECTIONS=2 phase "ranks as processes" suite "not cuda-thread" "$@"
# Streams of ranks in one process must not wait for each other in a queue.
CUDA_DEVICE_MAX_CONNECTIONS=32 phase "ranks as threads" suite "cuda-thread" "$@"
phase "Torch, CuPy and JAX" "$python" -m pytest -q test/python_cuda
if command -v compute-sanitizer >/dev/null; then
    # Everything takes many times as long.
    RANKS_PATIENCE=10 PYTHONPATH=test/python PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        phase "memcheck, 2 ranks" compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -m harness.watched cuda 2
else
    summary+=("$(printf '%-28s %s' memcheck 'left out: no compute-sanitizer on the PATH')")
fi

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
