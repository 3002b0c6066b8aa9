#!/usr/bin/env bash
# The README's learning curve of dance_grpo.py: the default run over 3 seeds, about 12 minutes on 4 CPU cores. The control
# is runs/flow_grpo.sh's. Results: runs/results/dance_grpo.json, assets/learning_curves.png.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python dance_grpo.py --seed $seed --out outputs/dance_grpo-seed$seed
done
python -m runs.plot dance_grpo
