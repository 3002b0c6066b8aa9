"""EditReward (https://arxiv.org/abs/2509.26346): Qwen2.5-VL with two regression heads, for instruction-guided editing.

    head 0, asked about instruction following:  (mu_0, uncertainty)
    head 1, asked about visual quality:         (mu_1, uncertainty)
    score = (mu_0 + mu_1) / 2, raw: about -5 .. 5

Each pair of pictures is seen once and read twice. The second column of the heads is an uncertainty, not an aspect of
quality, and takes no part. Parts, prompt template and 1-D positions as in rewards/hpsv3.py; that the training had 1-D
positions here too is read from its code (image_grid_thw never reaches the decoder), not from a run of it.
"""

import torch

from rewards.fetch import template as read_template
from rewards.hpsv3 import REWARD_TOKEN, head, load_trunk, usable

BATCH_SIZE = 4  # pairs per forward; a call may have any number
MODEL = "TIGER-Lab/EditReward-MiMo-VL-7B-SFT-2508"  # 17 GB; with TIGER-Lab/EditReward-Qwen2.5-VL-7B goes the base
BASE = "XiaomiMiMo/MiMo-VL-7B-SFT-2508"  # Qwen/Qwen2.5-VL-7B-Instruct
FILES = ["model.safetensors", "model.pth"]  # checkpoints have the one or the other


def load(device="cpu", model=MODEL, base=BASE, template=None, dtype=torch.bfloat16):
    """EditReward of samples["image"], edited from samples["source"] by the instructions in `prompts`.

    model, base: hub ids or local folders. template: None = what `python -m rewards fetch editreward` cached; else a
    JSON file {"following": text with {text_prompt}, "quality": likewise, "suffix": text with <|Reward|>}.

    Raises RuntimeError if the template or the weights are not here. An item with an image that is no uint8 [H, W, 3] or
    an instruction that is no str scores NaN.
    """
    wanted = {"following": "{text_prompt}", "quality": "{text_prompt}", "suffix": REWARD_TOKEN}
    texts = read_template("editreward", wanted, template)
    forms = [texts["following"] + texts["suffix"], texts["quality"] + texts["suffix"]]
    if any(form.count(REWARD_TOKEN) != 1 for form in forms):
        raise RuntimeError(f"editreward: template {template}: {REWARD_TOKEN} must be there once")
    head_names = ["rm_heads.head_0", "rm_heads.head_1"]
    see, read, heads = load_trunk("editreward", "Qwen2_5_VLModel", head_names, model, FILES, base, device, dtype)

    @torch.no_grad()
    def score(samples, prompts, metadata):
        images, sources = samples["image"], samples["source"]
        if not len(images) == len(sources) == len(prompts):
            counts = f"{len(images)} pictures, {len(sources)} sources"
            raise ValueError(f"editreward: {counts} for {len(prompts)} instructions")
        reward_B = torch.full((len(images),), torch.nan)
        items = [(i, usable(sources[i], images[i]), prompts[i]) for i in range(len(images))]
        items = [item for item in items if item[1] and isinstance(item[2], str)]
        for start in range(0, len(items), BATCH_SIZE):
            rows, pairs, instructions = zip(*items[start : start + BATCH_SIZE])
            tokens = see([p for pair in pairs for p in pair])
            features = [tokens[i : i + 2] for i in range(0, len(tokens), 2)]  # the source first
            mu_BK = []
            for head_name, form in zip(head_names, forms):
                hidden_BD = read(features, form, instructions)
                mu_BK.append(head(heads, head_name, hidden_BD)[:, 0])
            reward_B[list(rows)] = torch.stack(mu_BK).mean(0).cpu()
        return torch.where(reward_B.isfinite(), reward_B, torch.nan)

    score.needs, score.strict = ("image", "source"), None
    return score
