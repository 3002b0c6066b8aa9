#!/usr/bin/env bash
# Makes assets/tiny-blip3o from nothing: a 1.1 M parameter Qwen2.5-VL that answers questions about pictures of the shapes world and
# reads its captions, an autoencoder, and by `python pretrain.py`, without a flag, queries, connector and DiT. The language
# model is shipped as it is, all other weights in bf16, half the size. On 4 CPU cores: twenty minutes for the language model (one core),
# five minutes for the autoencoder (one core), at most 20 minutes for the rest. Results: runs/results/tiny_blip3o*.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m models.tiny tiny-blip3o-lm --out outputs/tiny-blip3o-lm
python -m models.tiny tiny-blip3o-sana --out outputs/tiny-blip3o-sana
rm -rf assets/tiny-blip3o assets/tiny-blip3o-start assets/tiny-metaquery-start
mkdir -p assets/tiny-blip3o
cp -r outputs/tiny-blip3o-lm assets/tiny-blip3o/lm
cp -r outputs/tiny-blip3o-sana assets/tiny-blip3o/sana
python - <<'PYTHON'
import json, os
import torch
from safetensors.torch import load_file, save_file
parts = {part: json.load(open(f"assets/tiny-blip3o/{part}/results.json")) for part in ("lm", "sana")}
json.dump(parts, open("runs/results/tiny_blip3o_parts.json", "w"), indent=1)
for part in parts:
    os.remove(f"assets/tiny-blip3o/{part}/results.json")
path = "assets/tiny-blip3o/sana/vae/diffusion_pytorch_model.safetensors"
save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
PYTHON
python pretrain.py --out outputs/tiny-blip3o
python - <<'PYTHON'
import json
import torch
from safetensors.torch import load_file, save_file
tensors = {name: t.bfloat16() for name, t in load_file("outputs/tiny-blip3o/model/model.safetensors").items()}
save_file(tensors, "assets/tiny-blip3o/model.safetensors", metadata={"format": "pt"})
config = json.load(open("outputs/tiny-blip3o/model/config.json")) | {"lm": "./lm", "sana": "./sana"}
json.dump(config, open("assets/tiny-blip3o/config.json", "w"), indent=2)
PYTHON
cp outputs/tiny-blip3o/metrics.jsonl runs/results/tiny_blip3o.jsonl
python -m runs.plot_pretrain outputs/tiny-blip3o
