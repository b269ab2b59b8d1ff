#!/usr/bin/env bash
# Speed of bkpack beside llama.cpp's, in turn in one run on the same threads; see benches/peers.md.
#
#     benches/peers.sh --work DIR --smollm2 CHECKPOINT --text FILE [--threads N] [--repetitions N] [--quick]
#                      [--llama-source DIR] [--llama-build DIR] [--bkpack FILE] [--build-only] [--record FILE]
#
# --work          folder for llama.cpp, models and results; what is there already is used again (about 5 GB)
# --smollm2       SmolLM2-135M as a Hugging Face folder in FP32
# --text          the text of the evaluation, at least 50 KB
# --threads       of both programs [default: all cores]
# --repetitions   of each measurement [default: 5]
# --quick         one repetition and less text, to see that everything runs
# --llama-source  folder of llama.cpp's source [default: fetched from PyPI, inside llama-cpp-python 0.3.36]
# --llama-build   folder of a build of it [default: built in the work folder with this CPU's instruction sets]
# --bkpack        the command [default: built from this repository in release mode]
# --build-only    prepare everything and measure nothing
# --record        Markdown file to write [default: benches/record/DATE-peers.md]
#
# Needs Linux, cmake, a C++ compiler, Python 3 with pip, and for what it builds about ten minutes once.
set -euo pipefail
cd "$(dirname "$0")/.."
work='' smollm2='' text='' threads=$(nproc) repetitions=5 quick='' source='' build='' bkpack='' build_only='' record=''
while [ $# -gt 0 ]; do
    case $1 in
    --work) work=$2 ;;
    --smollm2) smollm2=$2 ;;
    --text) text=$2 ;;
    --threads) threads=$2 ;;
    --repetitions) repetitions=$2 ;;
    --llama-source) source=$2 ;;
    --llama-build) build=$2 ;;
    --bkpack) bkpack=$2 ;;
    --record) record=$2 ;;
    --quick) quick=1 && repetitions=1 && shift && continue ;;
    --build-only) build_only=1 && shift && continue ;;
    *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
    esac
    shift 2
done
if [ -z "$work" ] || [ -z "$smollm2" ] || [ -z "$text" ]; then
    echo "error: --work, --smollm2 and --text are needed; benches/peers.sh --help says more" >&2
    exit 2
fi
mkdir -p "$work/models"

if [ -z "$bkpack" ]; then
    cargo build --release --quiet
    bkpack="${CARGO_TARGET_DIR:-target}/release/bkpack"
fi

package=llama_cpp_python-0.3.36
if [ -z "$build" ]; then
    build="$work/llama-build"
    if [ ! -x "$build/bin/llama-perplexity" ]; then
        if [ -z "$source" ]; then
            if [ ! -d "$work/$package" ]; then
                python3 -m pip download --quiet --no-binary :all: --no-deps --dest "$work" llama-cpp-python==0.3.36
                tar -xzf "$work/$package.tar.gz" -C "$work"
            fi
            source="$work/$package/vendor/llama.cpp"
        fi
        # GGML_NATIVE is off so that these flags alone decide; repacking of weights stays on.
        flags=(-DGGML_NATIVE=OFF -DGGML_CPU_REPACK=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF)
        has() { grep -qw "$1" <(grep -m1 '^flags' /proc/cpuinfo); }
        while read -r cpu option; do
            if has "$cpu"; then flags+=("-DGGML_$option=ON"); else flags+=("-DGGML_$option=OFF"); fi
        done <<'FLAGS'
sse4_2 SSE42
avx AVX
avx2 AVX2
fma FMA
f16c F16C
bmi2 BMI2
avx_vnni AVX_VNNI
avx512dq AVX512
avx512vbmi AVX512_VBMI
avx512_vnni AVX512_VNNI
avx512_bf16 AVX512_BF16
FLAGS
        cmake -S "$source" -B "$build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
            -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "${flags[@]}"
        cmake --build "$build" -j "$(nproc)" --target llama-bench llama-perplexity llama-quantize
    fi
fi

# Makes a model under a temporary name, so that an interrupted run leaves none half-written.
make_model() {
    local name=$1
    shift
    [ -e "$work/models/$name" ] && return
    "$@" "$work/models/new-$name" >"$work/models/$name.log" 2>&1 || { cat "$work/models/$name.log" >&2 && exit 1; }
    mv "$work/models/new-$name" "$work/models/$name"
}
models="$work/models"
convert() { "$bkpack" convert "${@:1:$#-1}" -o "${!#}" --force; }
export_gguf() { "$bkpack" export "${@:1:$#-1}" --to gguf -o "${!#}" --force; }
quantize() { "$build/bin/llama-quantize" "$models/smollm2-f32.gguf" "$2" "$1" "$threads"; }
synth() { "$bkpack" synth --preset tinyllama-1.1b -o "$1" --force; }
make_model smollm2-int4.bkpack convert "$smollm2" --bits 4
make_model smollm2-int4-head8.bkpack convert "$smollm2" --bits 4 --tensor 'embed=int8'
make_model smollm2-int8.bkpack convert "$smollm2" --bits 8
make_model smollm2-f32.bkpack convert "$smollm2" --bits 32
make_model smollm2-f32.gguf export_gguf "$models/smollm2-f32.bkpack" --dtype fp32
make_model smollm2-q4_0.gguf quantize Q4_0
make_model smollm2-q8_0.gguf quantize Q8_0
make_model tinyllama synth
make_model tinyllama-int4.bkpack convert "$models/tinyllama" --bits 4 --rounding rtn
make_model tinyllama-q4_0.gguf export_gguf "$models/tinyllama-int4.bkpack"
[ -n "$build_only" ] && exit

exec python3 benches/peers.py --bkpack "$bkpack" --llama "$build/bin" --models "$models" --text "$text" --threads "$threads" \
    --repetitions "$repetitions" ${quick:+--quick} --record "${record:-benches/record/$(date +%F)-peers.md}"
