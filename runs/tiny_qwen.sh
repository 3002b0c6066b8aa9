#!/usr/bin/env bash
# Makes assets/tiny-qwen from nothing: a character-level tokenizer and a 0.79 M parameter Qwen2, trained on sums of two-digit
# numbers and stopped when it solves 45 % of the validation problems, so that there is something left for reinforcement
# learning. About a minute on one CPU core. Results: runs/results/tiny_qwen.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m models.tiny tiny-qwen --out outputs/tiny-qwen
rm -rf assets/tiny-qwen
cp -r outputs/tiny-qwen assets/tiny-qwen
mv assets/tiny-qwen/results.json runs/results/tiny_qwen.json
