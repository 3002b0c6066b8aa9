#!/usr/bin/env bash
# The README's learning curve of rloo.py on questions about pictures, over 3 seeds, about 10 minutes on 4 CPU cores.
# Results: runs/results/rloo_shapes_qa.json, assets/learning_curves.png.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python rloo.py --lm tiny-qwen-vl --reward shapes_qa --seed $seed --out outputs/rloo_shapes_qa-seed$seed
done
python -m runs.plot rloo_shapes_qa
