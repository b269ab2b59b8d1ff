#!/usr/bin/env bash
# Installs libbkpack into a temporary folder, builds its example and its tests against it, and runs them: under the address
# and undefined-behaviour sanitizers, and linked statically under valgrind where that is installed.
#
#     capi/check.sh [PROFILE]
#
# PROFILE is release, or dev for a faster build. Needs gcc and g++ (or CC and CXX).
set -euo pipefail
cd "$(dirname "$0")/.."
profile="${1:-release}"
cc="${CC:-gcc}"
cxx="${CXX:-g++}"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
prefix="$out/prefix"

capi/install.sh "$prefix" "$profile"
cargo build --quiet --locked --workspace --profile "$profile" --bin bkpack
bkpack="${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}/bkpack"
# Every kind of encoding in one model.
mix=(--tensor 'q_proj=int3:g64:asym' --tensor 'k_proj=ternary:g32' --tensor 'v_proj=binary:row'
    --tensor 'gate_proj=int8:row' --tensor 'up_proj=int5:g32' --tensor 'embed=fp16')
"$bkpack" convert fixtures/llama -o "$out/llama.bkpack" --bits 4 --rounding rtn --quiet "${mix[@]}"
"$bkpack" convert fixtures/llama -o "$out/shards.bkpack" --bits 4 --rounding rtn --quiet --shard-size 1MB
vectors="$PWD/spec/vectors"

echo "header: C99, C11, C++11 and C++17 without a warning"
strict=(-Wall -Wextra -Wpedantic -Wconversion -Werror -I "$prefix/include")
echo '#include <bkpack.h>' > "$out/header.c"
cp "$out/header.c" "$out/header.cpp"
for standard in c99 c11; do "$cc" -std=$standard "${strict[@]}" -Wstrict-prototypes -fsyntax-only "$out/header.c"; done
for standard in c++11 c++17; do "$cxx" -std=$standard "${strict[@]}" -fsyntax-only "$out/header.cpp"; done

exported="$(nm -D --defined-only "$prefix/lib/libbkpack.so" | awk '{ print $NF }' | sort)"
declared="$(grep -o '\bbkpack_[a-z_]*(' "$prefix/include/bkpack.h" | grep -o 'bkpack_[a-z_]*' | sort -u)"
if [ "$exported" != "$declared" ]; then
    echo "libbkpack.so does not export what the header declares, and only that:" >&2
    diff <(echo "$declared") <(echo "$exported") >&2
    exit 1
fi
echo "symbols: the $(wc -l <<< "$declared") of the header, and no other"

# The snippet of the README between its fences.
awk '/^```c$/ { inside = 1; next } /^```$/ { inside = 0 } inside' README.md > "$out/readme.c"
[ -s "$out/readme.c" ] || { echo "README.md shows no C" >&2; exit 1; }

# build NAME SOURCE OPTIONS...
build() {
    "$cc" -std=c99 -D_POSIX_C_SOURCE=200809L "${strict[@]}" -g -o "$out/$1" "$2" "${@:3}" -pthread -lm
}
shared=(-L "$prefix/lib" -lbkpack "-Wl,-rpath,$prefix/lib")
sanitizers=(-fsanitize=address,undefined -fno-sanitize-recover=all)
static=("$prefix/lib/libbkpack.a" -lgcc_s -lutil -lrt -ldl)
for name in inspect calls readme; do
    case "$name" in
        inspect) source=capi/examples/inspect.c ;;
        calls) source=capi/tests/calls.c ;;
        readme) source="$out/readme.c" ;;
    esac
    build "$name" "$source" "${sanitizers[@]}" "${shared[@]}"
    build "$name-static" "$source" "${static[@]}"
done

# run SUFFIX TENSORS COMMAND...: every program, its name with the suffix, by a command; the example with some tensors.
run() {
    local suffix="$1" tensors="$2"
    shift 2
    "$@" "$out/calls$suffix" "$vectors" "$out/llama.bkpack" "$out"
    for tensor in $tensors; do
        "$@" "$out/inspect$suffix" "$out/llama.bkpack" "model.layers.5.$tensor.weight" | tail -n 2
    done
    "$@" "$out/inspect$suffix" "$out/shards.bkpack" > /dev/null
    (cd "$out" && "$@" "./readme$suffix")
}
cp "$out/llama.bkpack" "$out/model.bkpack"
all="self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj"
echo "sanitizers: address, undefined behaviour, leaks"
run "" "$all" env
if command -v valgrind > /dev/null; then
    # Addresses and leaks in the Rust code, which the sanitizers do not see into. Not undefined values: compiled Rust
    # compares whole words whose low bytes are padding that cannot change the outcome.
    echo "valgrind, linked statically"
    run -static self_attn.q_proj valgrind --quiet --undef-value-errors=no --leak-check=full \
        --show-leak-kinds=definite --errors-for-leak-kinds=definite --error-exitcode=1
else
    echo "valgrind is not installed: the static library runs without it"
    run -static "$all" env
fi
if command -v pkg-config > /dev/null; then
    flags="$(PKG_CONFIG_PATH="$prefix/lib/pkgconfig" pkg-config --cflags --libs bkpack)"
    # shellcheck disable=SC2086 # flags are meant to be split
    "$cc" -std=c99 -D_POSIX_C_SOURCE=200809L -o "$out/by-pkg-config" capi/examples/inspect.c $flags -pthread -lm
    LD_LIBRARY_PATH="$prefix/lib" "$out/by-pkg-config" "$out/llama.bkpack" > /dev/null
    echo "pkg-config: bkpack.pc links"
else
    echo "pkg-config is not installed: bkpack.pc is not tried"
fi
size() { stat -L -c %s "$1" | awk '{ printf "%.1f MB", $1 / 1e6 }'; }
strip -o "$out/stripped.so" "$prefix/lib/libbkpack.so"
echo "libbkpack.so: $(size "$prefix/lib/libbkpack.so"), stripped $(size "$out/stripped.so"), profile $profile"
