#!/usr/bin/env bash
# What to type first on a machine with a GPU: is it ready, does it fit, a step and a save, and then
# a short run with its report, for both presets.
#
#   examples/first_real_run.sh IMAGES                     Qwen3-VL-2B, 20 updates each, runs/first
#   STEPS=500 examples/first_real_run.sh IMAGES RUNS      as many images as the paper's 4,000 at batch 8 (preset paper: 500)
#   CONFIGS=nano examples/first_real_run.sh IMAGES RUNS --train.batch 2    other presets; any setting
#
# IMAGES: a folder of photographs. Weights (4.3 GB) come from the hub or, with --model.path DIR, from
# a directory. It ends at the first thing that is wrong, with that command's exit code; run again, it
# goes on where a run stopped. PYTHON names another interpreter.
set -euo pipefail

images="${1:?give a folder of images}"
runs="${2:-runs/first}"
shift $(($# < 2 ? $# : 2))
python="${PYTHON:-python}"
read -ra configs <<<"${CONFIGS:-qwen3-vl-2b paper}"

"$python" -m vise_fast.doctor --run.dir "$runs"
for config in "${configs[@]}"; do
    settings=(--config "$config" --data.dir "$images" --run.dir "$runs/$config")
    settings+=(--train.steps "${STEPS:-20}" "$@")
    echo "== $config: does it fit?"
    "$python" -m vise_fast.estimate "${settings[@]}"
    if [ ! -e "$runs/$config/run.json" ]; then
        echo "== $config: one step, saved and loaded again"
        "$python" -m vise_fast.train "${settings[@]}" --dry-run
    fi
    echo "== $config: ${STEPS:-20} updates"
    "$python" -m vise_fast.train "${settings[@]}" --train.resume auto
    "$python" -m vise_fast.report "$runs/$config"
done

if [ -d build/consumers ]; then
    for config in "${configs[@]}"; do
        "$python" -m vise_fast.table --adapter "$runs/$config/adapter" --out "$runs/$config/table" --tasks drawn
    done
else
    echo "tables of base and adapter: vise-fast table makes its own environment (7 GB)"
fi
for config in "${configs[@]}"; do
    echo "$runs/$config: report.html, adapter/, metrics.jsonl (seconds, memory and reward of every update)"
done
