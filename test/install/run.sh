#!/usr/bin/env bash
# Builds and runs a C++ program against mscclpp_ep in every way in which one can get at it.
#
#   test/install/run.sh PYTHON
#
# PYTHON is an interpreter with the wheel installed. Needs CMake >= 3.26 and Ninja.
set -euo pipefail

# The link itself, not what it points to: a virtual environment is found by it.
python=$(realpath --no-symlinks "$(command -v "${1:?usage: test/install/run.sh PYTHON}")")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# quietly COMMAND...: shows what the command prints only if it fails.
quietly() {
    "$@" >"$work/log" 2>&1 || {
        cat "$work/log"
        return 1
    }
}

# build NAME SOURCE [cmake arguments]: configures, builds and runs SOURCE's program `consumer`.
build() {
    local name=$1 source=$2
    shift 2
    printf -- '-- %s\n' "$name"
    quietly cmake -S "$source" -B "$work/$name" -G Ninja -DCMAKE_BUILD_TYPE=Release "$@"
    quietly cmake --build "$work/$name"
    "$work/$name/consumer"
}

# install NAME [cmake arguments]: builds the project and installs it in $work/NAME.
install() {
    local name=$1
    shift
    quietly cmake -S "$root" -B "$work/build-$name" -G Ninja -DCMAKE_INSTALL_PREFIX="$work/$name" "$@"
    quietly cmake --build "$work/build-$name" --target install
}

# In a folder of its own, so that the source tree is not on Python's path.
cd "$work"
cmake_dir=$("$python" -m mscclpp_ep --cmake-dir)
build wheel "$here/consumer" -Dmscclpp_ep_DIR="$cmake_dir"

# Without CMake: the two paths are enough.
printf -- '-- flags\n'
include=$("$python" -m mscclpp_ep --include-dir)
library=$(dirname "$include")/lib
"${CXX:-c++}" -std=c++20 "$here/consumer/main.cpp" -I"$include" -L"$library" \
    -Wl,-rpath,"$library" -lmscclpp_ep -o "$work/flags"
"$work/flags"

install prefix
build from-prefix "$here/consumer" -DCMAKE_PREFIX_PATH="$work/prefix"

install static -DBUILD_SHARED_LIBS=OFF
build from-static "$here/consumer" -DCMAKE_PREFIX_PATH="$work/static"

build subdirectory "$here/subdirectory" -DMSCCLPP_EP_SOURCE_DIR="$root"
printf -- '-- all consumers run\n'
