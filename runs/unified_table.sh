#!/usr/bin/env bash
# The README's table of grpo_unified.py: language model, diffusion model or both trained, for as many iterations of as many
# samples each, over 3 seeds. At most 5 minutes a run on one CPU core, half an hour in all. Results: runs/results/unified.json,
# assets/unified.png.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
for seed in 1 2 3; do
    for train in lm dm joint; do
        python grpo_unified.py --train $train --seed $seed --out outputs/unified-$train-seed$seed
    done
done
python -m runs.plot_unified table
