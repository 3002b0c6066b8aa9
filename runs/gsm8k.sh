#!/usr/bin/env bash
# Qwen2.5 Instruct on GSM8K, on one node of 8 GPUs with 80 GB:
#
#     runs/gsm8k.sh rloo 0.5b            # or remax; 0.5b, 1.5b, 3b, 7b
#
# Reports greedy accuracy on the 1,319 test problems, before, every 15 iterations and after, with one prompt and one way
# to read the answer throughout. Not run here yet: no number of ours exists. Those of other people (verl's table of
# baselines, GSM8K test accuracy, with their own prompts and answer extraction; the standard error is about 1 point):
#
#     Qwen2.5-0.5B-Instruct    49.6 on its model card      PPO 56.7    GRPO with LoRA 54.3
#     Qwen2.5-1.5B-Instruct                                            GRPO with LoRA 77.9
#     Qwen2.5-3B-Instruct                                              GRPO with LoRA 86.1
#     Qwen2.5-7B-Instruct                                 ReMax 97     GRPO with LoRA 93.4
#
# Their ReMax row names 7B and links a script for 3B: take it with care.
set -euo pipefail
cd "$(dirname "$0")/.."
algorithm=${1:?rloo or remax} size=${2:?0.5b, 1.5b, 3b or 7b}
case $size in # what each takes --dry-run says: at most 61 GiB per GPU, ReMax with 7b
    0.5b) memory=(--micro-batch-size 32 --keep-unsharded --no-checkpoint-activations) ;;
    1.5b) memory=(--micro-batch-size 8 --keep-unsharded --no-checkpoint-activations) ;;
    3b) memory=(--micro-batch-size 16 --keep-unsharded) ;;
    7b) memory=(--micro-batch-size 8) ;;
    *) echo "error: $size is none of 0.5b, 1.5b, 3b, 7b" >&2 && exit 1 ;;
esac
torchrun --nproc_per_node 8 "$algorithm.py" --lm "qwen2.5-$size" "${memory[@]}" --out "outputs/$algorithm-gsm8k-$size"
