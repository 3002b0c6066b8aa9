"""HPSv3 (https://arxiv.org/abs/2508.03789): Qwen2-VL-7B with a regression head, tuned on human choices.

    h = hidden state of the decoder at the token <|Reward|>
    (mu, sigma-like) = W3 relu(W2 relu(W1 h)),  score = mu, raw: about -2 .. 15, FLUX.1-dev averages 10.4

Some recipes divide by 15: give it a weight of 0.067 for that. Known hack: cluttered pictures exceed 15.

Two things decide whether the number is right. The prompt has to be the one of the training, to the letter (fetch.py).
And the decoder was trained with 1-D positions: its forward, on transformers 4.45, left out the three-row M-RoPE
positions that Qwen2-VL has, and the stock forward of today puts them back. Here the decoder is called with
position_ids = 0, 1, 2, ... in all three rows.

The trunk runs in bf16 as in training, the head in fp32. Needs 16 GB. rewards/editreward.py is built on the same parts.
"""

import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file

from rewards.fetch import template as read_template
from rewards.vlm_judge import picture

BATCH_SIZE = 8  # pictures per forward; a call may have any number
PIXELS = 256 * 28 * 28  # every picture is resized to about this area, sides multiples of 28: 256 tokens
MAX_ASPECT = 200  # the image processor refuses pictures that are longer
MODEL = "MizzenAI/HPSv3"  # 16 GB
FILE = "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"  # the checkpoint it was tuned from; only its configuration and tokenizer
REWARD_TOKEN = "<|Reward|>"


def file_of(model, name):
    """Path of a file of a hub id (downloaded if need be) or local folder; None if it is not there."""
    if os.path.isdir(model):
        path = os.path.join(model, name)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(model, name)
    except EntryNotFoundError:  # of the repository, or offline and not in the cache
        return None


def _state(model, files):
    """The state dict in the first of `files` that `model` has: safetensors, or a torch.save of nothing but tensors."""
    path = next(filter(None, (file_of(model, file) for file in files)), None)
    if path is None:
        raise OSError(f"no {' or '.join(files)}")
    if path.endswith(".safetensors"):
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state.get("model", state)


def split_state(state):
    """(weights of Qwen2VLModel / Qwen2_5_VLModel, weights of the heads) of a checkpoint.

    transformers up to 4.51 has visual.* and model.*, later model.visual.* and model.language_model.*; both are read.
    The output layer over the vocabulary is not needed.
    """
    trunk, heads = {}, {}
    for key, weight in state.items():
        if key.startswith(("rm_head.", "rm_heads.")):
            heads[key] = weight.float()
        elif not key.startswith("lm_head."):
            key = re.sub(r"^model\.(?=visual\.|language_model\.)", "", key)
            trunk[re.sub(r"^model\.", "language_model.", key)] = weight
    return trunk, heads


def head(heads, prefix, hidden_BD):
    """Linear - ReLU - (dropout) - Linear - ReLU - Linear in fp32: hidden_BD -> [B, 2], (mu, uncertainty)."""
    x = hidden_BD
    for layer in (0, 3, 5):  # the numbers they have in the nn.Sequential of the checkpoint
        x = torch.relu(x) if layer else x
        x = torch.nn.functional.linear(x, heads[f"{prefix}.{layer}.weight"], heads[f"{prefix}.{layer}.bias"])
    return x


def chat_template(base, tokenizer):
    """The chat template that the processor of `base` would use: its own file before the tokenizer's."""
    if path := file_of(base, "chat_template.jinja"):
        return Path(path).read_text("utf-8")
    if path := file_of(base, "chat_template.json"):
        return json.loads(Path(path).read_text("utf-8"))["chat_template"]
    if tokenizer.chat_template is None:
        raise OSError(f"no chat template in {base}")
    return tokenizer.chat_template


def load_trunk(name, model_class, head_names, model, files, base, device, dtype):
    """The parts of a Qwen-VL regression reward: (see, read, heads).

    see(list of B PIL pictures) -> B tensors [tokens, D], what the vision tower makes of them
    read(B lists of such tensors, form, B prompts) -> [B, D] fp32, the decoder's state at <|Reward|>, with 1-D
        positions. One user turn: the pictures, then `form`, whose {text_prompt} is replaced and which holds <|Reward|>
        once.
    heads: dict of the checkpoint's rm_head* weights, fp32 on `device`

    model_class: name of the transformers class. head_names: prefixes that the checkpoint must have. Raises RuntimeError
    if the files of `model` or `base` are not there or do not fit each other.
    """
    import transformers  # seconds to import

    try:
        config = getattr(transformers, model_class).config_class.from_pretrained(base)
        preprocess = transformers.Qwen2VLImageProcessorPil.from_pretrained(base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(transformers.AddedToken(REWARD_TOKEN, normalized=False, special=True), special_tokens=True)
        turns = chat_template(base, tokenizer)
        trunk, heads = split_state(_state(model, files))
        rows = len(trunk["language_model.embed_tokens.weight"]) if "language_model.embed_tokens.weight" in trunk else 0
        reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        # For the training the embedding was resized to the tokenizer, <|Reward|> being the last row: a tokenizer of
        # another version, or one without its files, would read a wrong row and give plausible numbers.
        if reward_id != rows - 1:
            raise OSError(f"{REWARD_TOKEN} is token {reward_id}, but the last of the {rows} embeddings is meant")
        config.text_config.vocab_size = rows
        vlm, report = getattr(transformers, model_class).from_pretrained(
            None, config=config, state_dict=trunk, dtype=dtype, output_loading_info=True
        )
        wrong = [key for part in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[part]]
        wrong += [f"{head_name}.0.weight" for head_name in head_names if f"{head_name}.0.weight" not in heads]
        if wrong:
            raise OSError(f"weights missing or not of this model: {', '.join(wrong[:3])}")
    except (OSError, RuntimeError, ValueError) as error:
        missing = [(model, files[0]), (base, "--include '*.json' --include '*.txt' --include '*.jinja'")]
        fixes = [f"hf download {repo} {wanted}" for repo, wanted in missing if not os.path.isdir(repo)]
        hint = f"\nDownload once, with a network: {' && '.join(fixes)}" if fixes else ""
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise RuntimeError(f"{name}: cannot load {model}, tokenizer from {base}: {reason}.{hint}") from None
    vlm = vlm.to(device).eval().requires_grad_(False)
    heads = {key: weight.to(device) for key, weight in heads.items()}
    # A user's prompt must not open a turn of its own or bring a second <|Reward|>.
    special = re.compile("|".join(re.escape(token) for token in sorted(tokenizer.get_added_vocab(), key=len)[::-1]))
    image_pad = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def see(pictures):
        # The size goes to the call: in from_pretrained it loses against min_pixels and max_pixels in Qwen's own file.
        size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        pixels = preprocess(images=pictures, size=size, return_tensors="pt").to(device)
        return vlm.get_image_features(pixels["pixel_values"].to(dtype), pixels["image_grid_thw"]).pooler_output

    def read(features, form, prompts):
        ids = []
        for item, prompt in zip(features, prompts):
            text = form.replace("{text_prompt}", special.sub(" ", prompt))
            content = [{"type": "image"}] * len(item) + [{"type": "text", "text": text}]
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=turns, tokenize=False, add_generation_prompt=True
            )
            parts = chat.split(image_pad)  # one for each picture; it has to be there once for each token of it
            chat = parts[0] + "".join(image_pad * len(tokens) + part for tokens, part in zip(item, parts[1:]))
            ids.append(torch.tensor(tokenizer(chat)["input_ids"]))
        # Padding to the right: attention is causal, so that no position before it sees it.
        ids_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
        embeds_BLD = vlm.get_input_embeddings()(ids_BL)
        place_BL = (ids_BL == config.image_token_id) & mask_BL.bool()
        embeds_BLD[place_BL] = torch.cat([tokens for item in features for tokens in item]).to(embeds_BLD.dtype)
        positions = torch.arange(ids_BL.shape[1], device=device).expand(3, *ids_BL.shape)
        hidden_BLD = vlm.language_model(
            inputs_embeds=embeds_BLD, attention_mask=mask_BL, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden_BLD[(ids_BL == reward_id) & mask_BL.bool()].float()

    return see, read, heads


def usable(*images):
    """The images (uint8 [H, W, 3]) as PIL pictures; None where one of them is none or longer than 200 : 1."""
    pictures = [picture(image) for image in images]
    bad = any(p is None or max(p.size) > MAX_ASPECT * min(p.size) for p in pictures)
    return None if bad else pictures


def load(device="cpu", model=MODEL, base=BASE, template=None, dtype=torch.bfloat16):
    """HPSv3's mu of samples["image"] under `prompts`; `model`, `base`: hub ids or local folders.

    template: None = what `python -m rewards fetch hpsv3` cached; else a JSON file {"instruction": text with
    {text_prompt}, "suffix": text with <|Reward|>}. dtype: of the trunk; float32 is for comparisons.

    Raises RuntimeError if the template or the weights are not here. An item whose image is no uint8 [H, W, 3] or whose
    prompt is no str scores NaN.
    """
    texts = read_template("hpsv3", {"instruction": "{text_prompt}", "suffix": REWARD_TOKEN}, template)
    form = texts["instruction"] + texts["suffix"]
    if form.count(REWARD_TOKEN) != 1:
        raise RuntimeError(f"hpsv3: template {template}: {REWARD_TOKEN} must be there once")
    see, read, heads = load_trunk("hpsv3", "Qwen2VLModel", ["rm_head"], model, [FILE], base, device, dtype)

    @torch.no_grad()
    def score(samples, prompts, metadata):
        images = samples["image"]
        if len(images) != len(prompts):
            raise ValueError(f"hpsv3: {len(images)} pictures for {len(prompts)} prompts")
        reward_B = torch.full((len(images),), torch.nan)
        items = [(i, usable(image), prompt) for i, (image, prompt) in enumerate(zip(images, prompts))]
        items = [item for item in items if item[1] and isinstance(item[2], str)]
        for start in range(0, len(items), BATCH_SIZE):
            rows, pictures, wanted = zip(*items[start : start + BATCH_SIZE])
            features = see([p for (p,) in pictures])
            hidden_BD = read([[tokens] for tokens in features], form, wanted)
            reward_B[list(rows)] = head(heads, "rm_head", hidden_BD)[:, 0].cpu()
        return torch.where(reward_B.isfinite(), reward_B, torch.nan)

    score.needs, score.strict = ("image",), None
    return score
