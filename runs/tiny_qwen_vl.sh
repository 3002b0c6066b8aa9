#!/usr/bin/env bash
# Makes assets/tiny-qwen-vl from nothing: a byte-level tokenizer and a 1.03 M parameter Qwen2.5-VL. Its vision tower learns
# which object lies where; its language model then learns to answer questions about pictures of the shapes world, from
# answers in which six words are wrong three times out of five. So it sees, and mixes up words: something for
# reinforcement learning to put right. Three minutes on one CPU core. Results: runs/results/tiny_qwen_vl.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m models.tiny tiny-qwen-vl --out outputs/tiny-qwen-vl
rm -rf assets/tiny-qwen-vl
cp -r outputs/tiny-qwen-vl assets/tiny-qwen-vl
mv assets/tiny-qwen-vl/results.json runs/results/tiny_qwen_vl.json
