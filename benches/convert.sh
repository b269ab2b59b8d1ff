#!/usr/bin/env bash
# Conversion to 4 bits beside llama.cpp's, in turn on the same machine: medians of wall time and their ratio.
#
#     benches/convert.sh LLAMA_QUANTIZE MODEL_F32.gguf CHECKPOINT_F32 [RUNS]
#
# LLAMA_QUANTIZE comes from the source inside the PyPI package llama-cpp-python: unpack it, and in vendor/llama.cpp
#     cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF
#     cmake --build build --target llama-quantize
# The GGUF and the checkpoint hold the same FP32 weights.
set -euo pipefail
quantize=$1 gguf=$2 checkpoint=$3 runs=${4:-9}
cd "$(dirname "$0")/.."
cargo build --release --quiet
bkpack="${CARGO_TARGET_DIR:-target}/release/bkpack"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT

seconds() { local start=$EPOCHREALTIME; "$@" >"$out/log" 2>&1; echo "$EPOCHREALTIME - $start" | bc; }
median() { sort -n | sed -n "$(((runs + 1) / 2))p"; }

cat "$gguf" "$checkpoint"/*.safetensors >/dev/null
for _ in $(seq "$runs"); do
    seconds "$bkpack" convert "$checkpoint" -o "$out/rtn.bkpack" --bits 4 --rounding rtn --threads 2 --force >>"$out/rtn"
    seconds "$bkpack" convert "$checkpoint" -o "$out/search.bkpack" --bits 4 --threads 2 --force >>"$out/search"
    seconds "$quantize" "$gguf" "$out/peer.gguf" Q4_0 2 >>"$out/peer"
done
rtn=$(median <"$out/rtn") search=$(median <"$out/search") peer=$(median <"$out/peer")
echo "bkpack INT4 g128, --rounding rtn   $rtn s"
echo "bkpack INT4 g128, scale search     $search s"
echo "llama-quantize Q4_0                $peer s"
echo "llama-quantize / bkpack rtn        $(echo "scale=2; $peer / $rtn" | bc)"
