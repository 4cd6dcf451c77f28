#!/usr/bin/env bash
# Tests the high-throughput mode on the GPUs that are visible, and measures it. Ranks beyond the
# number of GPUs share them.
#
#   test/gpu.sh PYTHON [PHASE...]
#
# PYTHON is an interpreter with the wheel, Torch with CUDA, CuPy, JAX with CUDA, ml_dtypes, pytest,
# pytest-timeout, hypothesis, rich and typer installed. Without a phase, all of them:
#
#   processes   the conformance suite, with ranks that are processes
#   threads     the same with ranks that are threads, which share a GPU with all their kernels
#   plain       some of it with plain copies, where the GPU has bulk copies
#   connection  some of it with CUDA_DEVICE_MAX_CONNECTIONS=1, as Megatron sets it
#   soak        10,000 operations with random delays by threads, 200 by 8 processes
#   frameworks  arrays of Torch, CuPy and JAX, and the bench
#   cpp         the C++ interface, if MSCCLPP_EP_TEST_GPU names the program test_gpu, which CMake
#               builds with MSCCLPP_EP_BUILD_TESTS in build/*/test
#   sanitizer   memcheck and racecheck on a small case, if compute-sanitizer is on the PATH
#   bench       the table of python -m mscclpp_ep bench --device cuda
#
# Slow tests are left out of the suite; PYTEST_ADDOPTS takes arguments of pytest.
# shellcheck disable=SC2329  # phases are called by their names
set -euo pipefail

# The link itself, not what it points to: a virtual environment is found by it.
python=$(realpath --no-symlinks "$(command -v "${1:?usage: test/gpu.sh PYTHON [PHASE...]}")")
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
    failures masks properties soak graphs integrity; do
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

# suite MARKS SELECTION: runs the tests that -m and -k expressions select.
suite() { "$python" -m pytest --backend cuda -q -m "$1" -k "$2" "${suites[@]}"; }

# A GPU has queues for a few hundred connections, and the pools of ranks live side by side.
phase_processes() {
    CUDA_DEVICE_MAX_CONNECTIONS=2 phase "ranks as processes" suite 'not slow' 'not cuda-thread'
}
# Streams of ranks in one process must not wait for each other in a queue.
phase_threads() {
    CUDA_DEVICE_MAX_CONNECTIONS=32 phase "ranks as threads" suite 'not slow' cuda-thread
}
phase_plain() {
    CUDA_DEVICE_MAX_CONNECTIONS=32 MSCCLPP_EP_PLAIN_COPIES=1 \
        phase "plain copies" suite 'not slow' 'cuda-thread-3 and (test_dispatch or test_combine or torrent)'
}
phase_connection() {
    CUDA_DEVICE_MAX_CONNECTIONS=1 phase "one connection" suite 'not slow' \
        'cuda-process-2 and (test_dispatch or test_combine or torrent or replays or nccl or two_buffers)'
}
phase_soak() {
    CUDA_DEVICE_MAX_CONNECTIONS=32 phase "soak, threads" suite slow 'test_torrent and cuda-thread'
    CUDA_DEVICE_MAX_CONNECTIONS=2 phase "soak, 8 processes" suite slow 'many_ranks and process-8'
}
phase_frameworks() { phase "frameworks" "$python" -m pytest -q test/python_cuda; }
phase_cpp() {
    if [ -z "${MSCCLPP_EP_TEST_GPU:-}" ]; then
        summary+=("$(printf '%-28s %s' C++ 'left out: MSCCLPP_EP_TEST_GPU names no program')")
        return
    fi
    CUDA_DEVICE_MAX_CONNECTIONS=32 phase "C++" "$MSCCLPP_EP_TEST_GPU"
}
phase_sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        summary+=("$(printf '%-28s %s' sanitizer 'left out: no compute-sanitizer on the PATH')")
        return
    fi
    local tool
    for tool in memcheck racecheck; do
        # Everything takes many times as long.
        RANKS_PATIENCE=10 PYTHONPATH=test/python${PYTHONPATH:+:$PYTHONPATH} PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            CUDA_DEVICE_MAX_CONNECTIONS=32 \
            phase "$tool, 2 ranks" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m harness.watched cuda 2
    done
}
phase_bench() { phase "bench" "$python" -m mscclpp_ep bench --device cuda; }

[ $# -gt 0 ] || set -- processes threads plain connection soak frameworks cpp sanitizer bench
for name in "$@"; do
    if ! declare -F "phase_$name" >/dev/null; then
        printf 'no phase "%s"\n' "$name" >&2
        exit 2
    fi
done
for name in "$@"; do "phase_$name"; done

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
