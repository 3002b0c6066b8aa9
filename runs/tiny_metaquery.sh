#!/usr/bin/env bash
# MetaQuery on the parts of tiny-blip3o: `python pretrain.py` with its architecture, uniform noise levels, and pictures that reach
# the DiT through the language model alone; 1,500 iterations, where runs/tiny_blip3o.sh has 2,400, as its guidance of edits takes three passes
# of the language model. A quarter of an hour on 4 CPU cores. Results: runs/results/tiny_metaquery.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
python pretrain.py --model tiny-metaquery-start --out outputs/tiny-metaquery --num-iterations 1500 --decay-iterations 1500
cp outputs/tiny-metaquery/metrics.jsonl runs/results/tiny_metaquery.jsonl
python -m runs.plot_pretrain outputs/tiny-blip3o
