#!/usr/bin/env bash
# Every measurement of speed in one go: the kernels beside the limits of this machine, then bkpack beside llama.cpp.
#
#     benches/run.sh --work DIR --smollm2 CHECKPOINT --text FILE [options of benches/peers.sh]
#
# Writes benches/record/DATE-kernels.md and benches/record/DATE-peers.md. Build llama.cpp and the models beforehand with
# `benches/peers.sh ... --build-only`; the measurements then take some 20 minutes on two cores. Leave the machine alone
# meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
threads=$(nproc)
for ((index = 1; index < $#; index++)); do
    if [ "${!index}" = --threads ]; then next=$((index + 1)) && threads=${!next}; fi
done
benches/peers.sh "$@" --build-only
cargo bench --quiet -p bkpack-kernels --no-run

record="benches/record/$(date +%F)-kernels.md"
{
    echo "# The kernels beside the limits of the machine, $(date +%F)"
    echo
    echo "$(nproc) cores, $(uname -sr), $(rustc --version); $threads threads. \`benches/run.sh\`: \`RAYON_NUM_THREADS=$threads cargo bench -p"
    echo "bkpack-kernels\`. The fastest of many repetitions, and its share of the limit that binds: the time that reading the"
    echo "operands from memory would take, or the arithmetic alone, whichever is longer."
    echo
    echo '```'
    RAYON_NUM_THREADS=$threads cargo bench --quiet -p bkpack-kernels
    echo '```'
} | tee "$record"
benches/peers.sh "$@"
