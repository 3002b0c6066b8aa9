#!/usr/bin/env bash
# Makes assets/tiny-blip3o from nothing: a 1.1 M parameter Qwen2.5-VL that answers questions about pictures of the shapes world and
# reads its captions, an autoencoder, by `python pretrain.py`, without a flag, queries, connector and DiT, and at last a cold
# start: to refine users' prompts. The language model is shipped in fp32, all other weights in bf16, half the size. On 4 CPU
# cores: twenty minutes for the language model (one core), five minutes for the autoencoder (one core), at most 20 minutes
# for pretraining, ten for the cold start. Results: runs/results/tiny_blip3o*.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m models.tiny tiny-blip3o-lm --out outputs/tiny-blip3o-lm
python -m models.tiny tiny-blip3o-sana --out outputs/tiny-blip3o-sana
rm -rf assets/tiny-blip3o assets/tiny-blip3o-start assets/tiny-metaquery-start
mkdir -p assets/tiny-blip3o
cp -r outputs/tiny-blip3o-lm assets/tiny-blip3o/lm-start
cp -r outputs/tiny-blip3o-sana assets/tiny-blip3o/sana
python - <<'PYTHON'
import json, os
import torch
from safetensors.torch import load_file, save_file
folders = {"lm": "assets/tiny-blip3o/lm-start", "sana": "assets/tiny-blip3o/sana"}
parts = {part: json.load(open(f"{folder}/results.json")) for part, folder in folders.items()}
json.dump(parts, open("runs/results/tiny_blip3o_parts.json", "w"), indent=1)
for folder in folders.values():
    os.remove(f"{folder}/results.json")
path = "assets/tiny-blip3o/sana/vae/diffusion_pytorch_model.safetensors"
save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
PYTHON
install() {  # the model of a run becomes assets/tiny-blip3o; lm-start stays, from which tiny-blip3o-start is made
    python - "$1" <<'PYTHON'
import json, os, shutil, sys
from safetensors.torch import load_file, save_file
source = sys.argv[1]
tensors = {name: t.bfloat16() for name, t in load_file(f"{source}/model.safetensors").items()}
save_file(tensors, "assets/tiny-blip3o/model.safetensors", metadata={"format": "pt"})
trained_lm = os.path.isdir(f"{source}/lm")
if trained_lm:
    shutil.copytree(f"{source}/lm", "assets/tiny-blip3o/lm", dirs_exist_ok=True)
config = json.load(open(f"{source}/config.json")) | {"lm": "./lm" if trained_lm else "./lm-start", "sana": "./sana"}
json.dump(config, open("assets/tiny-blip3o/config.json", "w"), indent=2)
PYTHON
}

python pretrain.py --out outputs/tiny-blip3o
install outputs/tiny-blip3o/model
cp outputs/tiny-blip3o/metrics.jsonl runs/results/tiny_blip3o.jsonl
python -m runs.plot_pretrain outputs/tiny-blip3o

# The cold start of `grpo_unified.py --task t2icot`: the language model learns to say a user's prompt as a caption, which moves
# what queries and DiT have learned to read; then they learn to read it again, captions and edits.
python pretrain.py --model tiny-blip3o --task t2icot --data shapes-cot --edit-data '' --train-lm --num-iterations 120 \
    --learning-rate 1e-4 --decay-iterations 0 --warmup-updates 10 --ema-decay 0 --eval-every 60 --eval-size 256 \
    --out outputs/tiny-blip3o-cot
install outputs/tiny-blip3o-cot/model
python pretrain.py --model tiny-blip3o --num-iterations 400 --learning-rate 4e-4 --decay-iterations 400 --ema-decay 0.99 \
    --eval-every 100 --eval-size 256 --out outputs/tiny-blip3o-again
install outputs/tiny-blip3o-again/model
cp outputs/tiny-blip3o-cot/metrics.jsonl runs/results/tiny_blip3o_cot.jsonl
cp outputs/tiny-blip3o-again/metrics.jsonl runs/results/tiny_blip3o_again.jsonl
