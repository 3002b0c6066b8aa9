#!/usr/bin/env bash
# The README's learning curve: the default run over 3 seeds, and as a control the same minutes of further pretraining of
# the same weights at the learning rate that their pretraining ended with, judged on the same held-out pictures. About 20
# minutes on 4 CPU cores. Results: runs/results/flow_grpo.json, assets/learning_curves.png, assets/before_after.png.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python flow_grpo.py --seed $seed --out outputs/flow_grpo-seed$seed
done
python pretrain.py --model tiny-flux --seed 101 --num-iterations 1500 --eval-every 150 --save-every 1500 --out outputs/control-seed1 \
    --eval-prompts shapes#single_object,two_object,counting,colors
python -m runs.plot flow_grpo
