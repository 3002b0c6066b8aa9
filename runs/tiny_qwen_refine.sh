#!/usr/bin/env bash
# Makes assets/tiny-qwen-refine from nothing: a word-level tokenizer and a 0.15 M parameter Qwen2, trained to say what a user
# asks for in the words of captions of the shapes world. It is taught to take 24 words for others three times out of five, so
# that there is something left for reinforcement learning. Two minutes on one CPU core. Results:
# runs/results/tiny_qwen_refine.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m models.tiny tiny-qwen-refine --out outputs/tiny-qwen-refine
rm -rf assets/tiny-qwen-refine
cp -r outputs/tiny-qwen-refine assets/tiny-qwen-refine
mv assets/tiny-qwen-refine/results.json runs/results/tiny_qwen_refine.json
