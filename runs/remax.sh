#!/usr/bin/env bash
# The README's learning curve of remax.py: the default run over 3 seeds, about 4 minutes on 4 CPU cores. Results:
# runs/results/remax.json, assets/learning_curves.png.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python remax.py --seed $seed --out outputs/remax-seed$seed
done
python -m runs.plot remax
