#!/usr/bin/env bash
# Packs the small real checkpoint in fixtures/ to 4 bits, measures what that cost, and verifies the result.
set -euo pipefail
cd "$(dirname "$0")"
cargo build --release --quiet --workspace --bin bkpack # as the tests build it: one set of features, nothing twice
bkpack="${CARGO_TARGET_DIR:-target}/release/bkpack"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT

show() {
    echo
    echo "\$ bkpack $*" | sed "s|$out/||g"
    "$bkpack" "$@"
}

show convert fixtures/llama -o "$out/llama.bkpack" --bits 4 --group-size 128
show eval "$out/llama.bkpack" --baseline fixtures/llama --text fixtures/wikitext2.test.txt --ctx 256 --limit-tokens 32768
show verify "$out/llama.bkpack" --min-ratio 6 --max-ppl-increase 3% --max-kld 0.02 \
    --baseline fixtures/llama --text fixtures/wikitext2.test.txt --ctx 256 --limit-tokens 8192
