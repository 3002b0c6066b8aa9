#!/usr/bin/env bash
# Other tasks of grpo_unified.py on tiny models, over 3 seeds: a unified model that refines and draws, one that edits and edits
# back, and a language model that answers. An hour and a half on one CPU core. Results: runs/results/unified_tasks.json.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
for seed in 1 2 3; do
    python grpo_unified.py --model tiny-blip3o --task t2icot --seed $seed --out outputs/unified-t2icot-seed$seed
    python grpo_unified.py --model tiny-blip3o --task i2i_cycle --seed $seed --out outputs/unified-i2i_cycle-seed$seed
    python grpo_unified.py --task text --lm tiny-qwen --seed $seed --out outputs/unified-text-seed$seed
done
python -m runs.plot_unified tasks
