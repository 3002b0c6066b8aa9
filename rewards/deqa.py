"""Five-level quality by a Qwen-VL: the read-out of Q-Align (https://arxiv.org/abs/2312.17090) and DeQA-Score.

    p = softmax over the logits of " excellent", " good", " fair", " poor", " bad" after "The quality of the picture is"
    score = (5 p_excellent + 4 p_good + 3 p_fair + 2 p_poor + 1 p_bad) / 5, in 0.2 .. 1

This is not DeQA-Score and its numbers do not compare with published ones: that checkpoint (mPLUG-Owl2) exists only as
code for transformers 4.36. Here any Qwen2-VL, Qwen2.5-VL or Qwen3-VL answers, as it was released, without tuning on
human ratings. The prompt plays no part: it judges the picture alone.

The model runs in bf16 with its own M-RoPE positions, the softmax in fp32.
"""

import os

import torch

from rewards.hpsv3 import chat_template, usable

BATCH_SIZE = 8  # pictures per forward; a call may have any number
PIXELS = 56 * 56, 1024 * 28 * 28  # larger pictures are averaged down to about 896 x 896: 1024 tokens
MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"  # 17 GB
LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
QUESTION = "How good is the quality of this picture? Judge sharpness, noise, artefacts and exposure, not the subject."
OPENING = "The quality of the picture is"  # of the answer; the level is the next token


def load(device="cpu", model=MODEL, question=QUESTION, dtype=torch.bfloat16):
    """Expected quality level / 5 of samples["image"]; `model`: hub id or local folder of a Qwen-VL.

    Raises RuntimeError if it is neither local nor to be had from the hub, or its tokenizer splits the level words. An
    item whose image is no uint8 [H, W, 3] scores NaN.
    """
    import transformers  # seconds to import

    try:
        preprocess = transformers.Qwen2VLImageProcessorPil.from_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        levels = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in LEVELS]
        if not all(len(ids) == 1 for ids in levels):
            raise OSError("its tokenizer has no single token for each of " + ", ".join(LEVELS))
        turns = chat_template(model, tokenizer)
        vlm = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "" if os.path.isdir(model) else f"\nDownload once, with a network: hf download {model}"
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise RuntimeError(f"deqa: cannot load {model}: {reason}.{hint}") from None
    vlm = vlm.to(device).eval().requires_grad_(False)
    image_pad = tokenizer.convert_ids_to_tokens(vlm.config.image_token_id)
    levels = torch.tensor(levels, device=device)[:, 0]
    worth = torch.tensor([value / 5 for value in LEVELS.values()], device=device)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    before, after = tokenizer.apply_chat_template(
        chat, chat_template=turns, tokenize=False, add_generation_prompt=True
    ).split(image_pad)

    @torch.no_grad()
    def score(samples, prompts, metadata):
        reward_B = torch.full((len(samples["image"]),), torch.nan)
        items = [(i, usable(image)) for i, image in enumerate(samples["image"])]
        items = [(i, pictures[0]) for i, pictures in items if pictures]
        for start in range(0, len(items), BATCH_SIZE):
            rows, pictures = zip(*items[start : start + BATCH_SIZE])
            size = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}  # as in rewards/hpsv3.py
            pixels = preprocess(images=list(pictures), size=size, return_tensors="pt")
            counts = (pixels["image_grid_thw"].prod(-1) // preprocess.merge_size**2).tolist()
            ids = [torch.tensor(tokenizer(before + image_pad * n + after + OPENING)["input_ids"]) for n in counts]
            ids_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # to the right
            mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(
                device
            )
            hidden_BLD = vlm.model(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                # Without these types transformers 5 has no M-RoPE, and no error.
                mm_token_type_ids=(ids_BL == vlm.config.image_token_id).int() * mask_BL,
                pixel_values=pixels["pixel_values"].to(device, dtype),
                image_grid_thw=pixels["image_grid_thw"].to(device),
                use_cache=False,
            ).last_hidden_state
            last_BD = hidden_BLD[torch.arange(len(ids)), mask_BL.sum(-1) - 1]
            logits_BK = vlm.lm_head(last_BD).float()[:, levels]
            reward_B[list(rows)] = (logits_BK.softmax(-1) @ worth).cpu()
        return torch.where(reward_B.isfinite(), reward_B, torch.nan)

    score.needs, score.strict = ("image",), None
    return score
