#!/usr/bin/env bash
# The README's learning curve of rloo.py: the default run over 3 seeds, about 5 minutes on 4 CPU cores. Results:
# runs/results/rloo.json, assets/learning_curves.png.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python rloo.py --seed $seed --out outputs/rloo-seed$seed
done
python -m runs.plot rloo
