#!/usr/bin/env bash
# Makes assets/tiny-flux from nothing: tokenizers, random text encoders, an autoencoder trained on shapes pictures, and a 0.69 M
# parameter FLUX transformer pretrained by pretrain.py. The learning rate reaches its final value after two thirds of the
# iterations; over the last third, at that rate, strict accuracy moves by less than 0.02. The
# weights that are shipped were made by these commands, of which the second was stopped once (SIGTERM, at iteration 1858) and resumed
# with another number of threads; and pretrain.py drew its noise levels in another way then, so a run of today comes to other weights.
# Tens of minutes on 4 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m models.tiny tiny-flux --out outputs/tiny-flux-start
python pretrain.py --model outputs/tiny-flux-start --out outputs/tiny-flux --num-iterations 6000 --learning-rate 4e-3 \
    --warmup-updates 50 --decay-iterations 4000 --final-learning-rate 1e-4 --num-steps 8 --eval-every 500 --save-every 500
rm -rf assets/tiny-flux
cp -r outputs/tiny-flux/model assets/tiny-flux
cp outputs/tiny-flux/metrics.jsonl runs/results/tiny_flux.jsonl
