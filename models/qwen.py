"""
Language models as policies: Qwen, Qwen2.5-VL, Qwen3-VL, and any other causal language model of transformers that ends
in a plain linear head. What we own is what an RL step touches: sampling, and the log-probs of what was sampled.

Tokens are drawn from softmax(z / T) and nothing else: no top-p, top-k or repetition penalty, whatever the model's
generation_config.json asks for, because the log-prob that is trained would then belong to another distribution. The
forward pass of the module in `parts` is replaced by two that keep the head inside it, so that FSDP2's hooks gather its
weight: log-probs through kernels.linear_logp, and the logits of the last token for decoding.

Of a model that takes pictures, the vision tower is frozen: it is no part of `parts`, not sharded, and runs once per
prompt, in `encode`, without gradients, as the text encoders of the flow models do. What it saw stays with the prompt
(`Prompt`), and all samples of the prompt and their replay share it; only the language model is trained.
"""

import copy
import functools
import importlib.util
import os
import unicodedata
from contextlib import ExitStack

import numpy as np
import torch
from PIL import Image
from transformers.cache_utils import DynamicCache, DynamicLayer

import models
from kernels.linear_logp import IGNORE, linear_logp
from kernels.sde_step import LOW32, philox_words
from models import parallel
from models import pipeline as common

# B samples, P prompt tokens (padded on the left), L sampled tokens (padded on the right), S = prompt + sampled tokens,
# V vocabulary, D width

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ("qwen2_5_vl", "qwen3_vl")  # the model_type of those that take pictures
# What stock transformers wants beside the weights and the tokenizer of those, where the checkpoint has it
PROCESSOR_FILES = [
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
]
PATCHES = 2**15  # of pictures that the vision tower sees in one call; 6,000 are one of 1,100 x 1,100 px
BLOCK = 256  # tokens of the vocabulary that are drawn as one, before one of them is
SYNC_EVERY = 8  # tokens between two questions to the device whether all rows have ended


def load(source, device, dtype, lora_rank=0, lora_alpha=0, with_reference=False, chat=True, train=True):
    """Load a folder or hub id of transformers' AutoModelForCausalLM (AutoModelForImageTextToText for Qwen2.5-VL and
    Qwen3-VL) and AutoTokenizer as a `Qwen`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16).
    lora_rank: 0 trains every parameter (fp32 masters), else a PEFT adapter of that rank (scale lora_alpha / lora_rank).
    with_reference: under full fine-tuning, keep a frozen copy (with LoRA the adapter is switched off instead). chat:
    prompts go through the chat template; False takes them as plain text. train: False is a frozen model, all in dtype.

    Raises RuntimeError with one message for a gated, missing, unreachable or incomplete model; ValueError for a
    tokenizer that lacks its vocabulary or a chat template, or knows more tokens than the model, for a model without
    `layers` or whose logits are more than hidden states times a matrix (a soft cap is fine), and for a folder without
    config.json.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder = _folder(source)
    takes_images = models.model_type(folder) in VISION
    auto_class = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    image_processor, processor_files = None, {}
    try:
        # trust_remote_code=False where it is the default, too: otherwise transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if takes_images:
            # Not the processor of both text and pictures, which needs torchvision.
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
            for name in PROCESSOR_FILES:
                if os.path.exists(os.path.join(folder, name)):
                    with open(os.path.join(folder, name), "rb") as f:
                        processor_files[name] = f.read()
        lm, info = auto_class.from_pretrained(
            folder,
            dtype=torch.float32 if train and lora_rank == 0 else dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except OSError as error:
        raise RuntimeError(f"'{source}' is incomplete, download or save it again: {error}") from None
    if info["missing_keys"]:
        # transformers draws random weights for them, and goes on.
        missing = sorted(info["missing_keys"])
        raise RuntimeError(f"'{source}' is incomplete: {len(missing)} weights are missing, first {missing[0]}")
    _check(source, lm, tokenizer, image_processor, chat)
    training = dict(lora_rank=lora_rank, lora_alpha=lora_alpha, with_reference=with_reference, train=train)
    eyes = dict(image_processor=image_processor, processor_files=processor_files)
    return Qwen(lm, tokenizer, device, dtype, source, chat=chat, **training, **eyes)


def _folder(source):
    """The local folder of a folder or hub id, downloaded if need be."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(source):
        return source
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"'{source}': no such folder, and no hub id owner/name")
    # Not what repositories hold beside it: the same weights as .bin, .pth, .gguf or .onnx.
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
    return models.hub(source, lambda: snapshot_download(source, allow_patterns=patterns))


def _check(source, lm, tokenizer, image_processor, chat):
    vocabulary = lm.get_input_embeddings().num_embeddings
    # transformers makes a tokenizer of only special tokens where the files are missing, and says nothing.
    if len(tokenizer) < vocabulary / 2:
        raise ValueError(
            f"'{source}': tokenizer has {len(tokenizer)} tokens for a model of {vocabulary}; "
            f"its files are missing or belong to another model"
        )
    if max(tokenizer.get_vocab().values()) >= vocabulary:
        raise ValueError(f"'{source}': tokenizer has {len(tokenizer)} tokens, but the model only {vocabulary}")
    if chat and not tokenizer.chat_template:
        raise ValueError(f"'{source}': tokenizer has no chat template; take an instruct model, or chat=False")
    head = lm.get_output_embeddings()
    config = lm.config.get_text_config()
    scales = [s for s in ("logit_scale", "logits_scaling", "lm_head_multiplier") if getattr(config, s, 1) != 1]
    if not isinstance(head, torch.nn.Linear) or head.bias is not None or scales:
        what = f"scaled logits ({scales[0]})" if scales else "a head that is no matrix"
        raise ValueError(f"'{source}': {type(lm).__name__} has {what}, which is not supported")
    if not hasattr(_decoder(lm), "layers"):
        raise ValueError(f"'{source}': {type(lm).__name__} does not list its decoder in `layers`; not supported")
    if image_processor:
        vision, images = lm.config.vision_config, image_processor
        wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        if (images.patch_size, images.merge_size, images.temporal_patch_size) != wanted:
            raise ValueError(
                f"'{source}': preprocessor_config.json belongs to another model: the patch size, merge size and "
                f"temporal patch size of this one are {', '.join(map(str, wanted))}"
            )


def _decoder(lm):
    """The module with the embedding, the decoder layers and the last norm."""
    return lm.base_model.language_model if lm.config.model_type in VISION else lm.base_model


class Prompt(list):
    """Token ids of a prompt with pictures, the placeholder repeated once for every token of a picture, and what the
    vision tower made of them. Pass it on as it is: a slice or a copy by list() is blind.

    where: int64 [n], the places of those tokens. positions: int64 [3, len], for M-RoPE: time, row, column. features:
    [n, D], deepstack: a list of [n, D] (Qwen3-VL, else empty).
    """

    def __init__(self, ids, where, positions, features, deepstack):
        super().__init__(ids)
        self.where, self.positions, self.features, self.deepstack = where, positions, features, deepstack


class Qwen:
    """The language-model contract. `parts` is what is trained, `blocks` what is sharded, checkpointed and compiled one
    by one. `parts["lm"]` is a transformers model with another `forward`, and without its vision tower: use the methods
    here. `attention` names the attention in use, `takes_images` says whether `encode` takes pictures."""

    def __init__(
        self,
        lm,
        tokenizer,
        device,
        dtype,
        source="",
        lora_rank=0,
        lora_alpha=0,
        with_reference=False,
        chat=True,
        image_processor=None,
        processor_files=None,
        train=True,
    ):
        self.device, self.dtype, self.source, self.chat = torch.device(device), dtype, source, chat
        self.tokenizer, self.model_class = tokenizer, type(lm)
        self.image_processor, self.processor_files = image_processor, processor_files
        self.takes_images = image_processor is not None
        self.image_token = lm.config.image_token_id if self.takes_images else None
        config = lm.config.get_text_config()
        self.context = config.max_position_embeddings
        self.stop_ids = _stop_ids(lm, tokenizer)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.attention = _use_best_attention(lm, self.device, dtype)
        # Decoding takes a mask that is ready for use where the model has it (a 2-D one costs a host sync per token).
        types = set(getattr(config, "layer_types", None) or ["full_attention"])
        self.plain_attention = config._attn_implementation == "sdpa" and types == {"full_attention"}
        lm = lm.to(self.device).eval()
        if self.takes_images:
            self.tower = _in_dtype(lm.model.visual.requires_grad_(False), dtype)
            del lm.model.visual
        self.reference_parts = None
        if not train:
            lm.requires_grad_(False)
        elif lora_rank > 0:
            common.add_lora(lm, lora_rank, lora_alpha, LORA_TARGETS)
        else:
            lm.requires_grad_(True)
            if with_reference:
                self.reference_parts = {"lm": _in_dtype(copy.deepcopy(lm).requires_grad_(False), dtype)}
        self.parts = {"lm": lm}
        for part in (self.parts, self.reference_parts or {}):
            for module in part.values():
                module.forward = functools.partial(_forward, module, self.softcap)

    def blocks(self, part):
        """The decoder layers of one part (a module out of `parts` or `reference_parts`)."""
        return list(_decoder(part).layers)

    def encode(self, messages, max_new_tokens=0, images=None):
        """Token ids of each prompt, a list of lists without padding; a `Prompt` where there are pictures.

        messages: a str, or a list of chat messages {"role", "content"}, per prompt. They go through the chat template,
        thinking switched off where it can be; with chat=False they must be str. images: None, or per prompt a PIL
        image, a list of them, or None. They stand in front of a str; in a list of chat messages, and with chat=False,
        the message says itself where. Raises ValueError for a prompt that is empty, leaves less than max_new_tokens of
        the model's context or has not as many places as pictures, and for pictures that the model does not take.
        """
        prompts, seen, messages = [], [], list(messages)  # seen: number and pixels of those with pictures
        for message, pictures in zip(messages, images or [None] * len(messages), strict=True):
            pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures or [])
            if pictures and not self.takes_images:
                raise ValueError(f"'{self.source}' takes no pictures: choose a Qwen2.5-VL or Qwen3-VL model")
            ids = self._tokenize(message, len(pictures))
            if not ids:
                raise ValueError("a prompt is empty: there is nothing to predict its first token from")
            if ids.count(self.image_token) != len(pictures):
                raise ValueError(
                    f"a prompt has {ids.count(self.image_token)} places for {len(pictures)} pictures, set by the chat "
                    f"template or the image tokens of the prompt itself: {str(message)[:60]!r}"
                )
            if pictures:
                pixels = self.image_processor(images=pictures, return_tensors="pt")
                sizes = iter((pixels.image_grid_thw.prod(1) // self.image_processor.merge_size**2).tolist())
                ids = [i for token in ids for i in [token] * (next(sizes) if token == self.image_token else 1)]
                seen.append((len(prompts), pixels))
            if len(ids) > self.context - max_new_tokens:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens} do not fit into the context "
                    f"of {self.context} tokens: {str(message)[:60]!r}"
                )
            prompts.append(ids)
        while seen:  # some pictures at a time: few calls, and little memory
            patches = np.cumsum([len(pixels.pixel_values) for _, pixels in seen])
            count = max(1, int(np.searchsorted(patches, PATCHES, side="right")))
            numbers, pixels = zip(*seen[:count])
            for number, prompt in zip(numbers, self._look([prompts[n] for n in numbers], pixels)):
                prompts[number] = prompt
            seen = seen[count:]
        return prompts

    def _tokenize(self, message, num_pictures):
        if not self.chat:
            return list(self.tokenizer(message).input_ids)
        if isinstance(message, str):
            content = [{"type": "image"}] * num_pictures + [{"type": "text", "text": message}]
            message = [{"role": "user", "content": content if num_pictures else message}]
        return list(
            self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
        )

    @torch.no_grad()
    def _look(self, prompts, pixels):
        """The `Prompt` of each of some lists of ids with one placeholder for every token of its pictures in pixels."""
        grids = [part.image_grid_thw for part in pixels]
        values = torch.cat([part.pixel_values for part in pixels])
        out = self.tower(values.to(self.device, self.dtype), grid_thw=torch.cat(grids).to(self.device))
        sizes = [int((grid.prod(1) // self.image_processor.merge_size**2).sum()) for grid in grids]
        deepstack = [level.split(sizes) for level in getattr(out, "deepstack_features", None) or []]
        looked = []
        for n, (ids, grid, features) in enumerate(zip(prompts, grids, out.pooler_output.split(sizes))):
            tokens = torch.tensor([ids])
            seen = tokens == self.image_token
            # Text counts up; the tokens of a picture share one time and count rows and columns from there; what follows
            # goes on after the larger of the two (section 2.1 of Qwen2-VL, https://arxiv.org/abs/2409.12191).
            kinds = seen.int()
            positions, _ = self.parts["lm"].model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=grid)
            levels = [level[n] for level in deepstack]
            looked.append(Prompt(ids, seen[0].nonzero()[:, 0], positions[:, 0], features, levels))
        return looked

    def check_lengths(self, prompts, max_new_tokens):
        """Raise encode's ValueError for the first of an iterable of prompts without pictures that does not fit into the
        context. Cheap: tokenizers that fall back on bytes make no more tokens of a text than it has UTF-8 bytes, so
        that only texts with more bytes than that are tokenized."""
        frame = self.tokenizer.num_special_tokens_to_add()
        if self.chat:
            turns = [{"role": "user", "content": ""}]
            text = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, enable_thinking=False, tokenize=False
            )
            frame += len(text.encode())
        for prompt in prompts:
            # The normal form is Qwen's, and can have more bytes than the text.
            text = unicodedata.normalize("NFC", prompt) if isinstance(prompt, str) else None
            if text is None or len(text.encode()) > self.context - max_new_tokens - frame:
                self.encode([prompt], max_new_tokens)

    def decode(self, ids, mask):
        """The text of each row of ids int64 [B, L] where mask is 1, without special tokens."""
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool())]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    @torch.no_grad()
    def generate(self, prompt_ids, max_new_tokens, temperature, seeds):
        """Sample a completion of each prompt; at least one prompt per rank. All ranks call it together.

        prompt_ids: what encode returned. temperature: float or fp32 [B], 0 = greedy. seeds: int64 [B]; token j of a row
        is a function of its prompt, its seed and j, and of neither batch nor rank (up to the rounding of logits).
        Returns a dict: ids int64 [B, L], padded on the right; mask int64 [B, L], 1 = sampled, the stop token included;
        truncated bool [B], no stop token within max_new_tokens; logps fp32 [B, L] in nats under softmax(z / T)
        (T = 1 for greedy rows), 0 where mask is 0. L is that of this rank's longest row.

        Parameters stay gathered from the first token on (memory of one copy in the compute dtype), so ranks communicate
        nothing per token and may end at different lengths.
        """
        lm, B = self.parts["lm"], len(prompt_ids)
        temperature, greedy = self._temperature(temperature, B)
        inverse_temperature, greedy = 1 / temperature, greedy if greedy.any() else None
        lengths = [len(ids) for ids in prompt_ids]
        if min(lengths, default=0) == 0 or max_new_tokens < 1:
            raise ValueError("generate needs prompts that are not empty and max_new_tokens >= 1")
        P = max(lengths)
        padded = [[0] * (P - len(ids)) + list(ids) for ids in prompt_ids]
        input_ids = torch.tensor(padded, device=self.device)
        positions, visual = self._layout(prompt_ids, [P - n for n in lengths], P + max_new_tokens)
        lengths = torch.tensor(lengths, device=self.device)[:, None]
        # Every key but the padding in front is visible; a mask for the whole of the completion, cut at every token.
        visible = torch.arange(P + max_new_tokens, device=self.device) >= P - lengths
        uniform = _uniform(seeds.to(self.device), max_new_tokens)
        stop = torch.tensor(self.stop_ids, dtype=torch.int64, device=self.device)
        ids = input_ids.new_full((B, max_new_tokens), self.tokenizer.pad_token_id or 0)
        logps = torch.zeros(B, max_new_tokens, device=self.device)
        mask, finished = torch.zeros_like(ids), torch.zeros(B, dtype=torch.bool, device=self.device)

        was_training = lm.training
        lm.eval()
        try:
            with parallel.unsharded(self.parts, keep=True), ExitStack() as stack:
                cache, attention_mask = _cache(lm.config, P + max_new_tokens), visible[:, :P].long()
                position_ids = positions[..., :P]
                for j in range(max_new_tokens):
                    inputs = dict(attention_mask=attention_mask, position_ids=position_ids, visual=visual)
                    logits = lm(input_ids, cache=cache, **inputs)
                    if j == 0:
                        stack.enter_context(parallel.without_hooks(self.parts))
                    token, logp = _sample(logits * inverse_temperature[:, None], uniform[:, j], greedy)
                    ids[:, j] = torch.where(finished, ids[:, j], token)
                    logps[:, j] = torch.where(finished, 0.0, logp)
                    mask[:, j] = ~finished
                    finished |= torch.isin(token, stop)
                    if (j + 1) % SYNC_EVERY == 0 and finished.all():
                        break
                    input_ids, position_ids, visual = token[:, None], positions[..., P + j : P + j + 1], None
                    seen = visible[:, : P + j + 1]
                    attention_mask = seen[:, None, None] if self.plain_attention else seen.long()
        finally:
            lm.train(was_training)
        L = int(mask.sum(1).max())
        return {"ids": ids[:, :L], "mask": mask[:, :L], "truncated": ~finished, "logps": logps[:, :L]}

    def logps(self, prompt_ids, completion_ids, mask, temperature, return_entropy=False):
        """log softmax(z / T) of the completions, fp32 [B, L] in nats, differentiable; 0 where mask is 0.

        prompt_ids: what encode returned. completion_ids, mask: [B, L], padded on the right. temperature: float or fp32
        [B], 0 counts as 1. With return_entropy also the entropy of that distribution at every token, fp32 [B, L]. All
        ranks call it together.
        """
        B, L = completion_ids.shape
        mask = mask.to(self.device).bool()
        temperature, _ = self._temperature(temperature, B)
        # Prompt, completion, padding: under causal attention no token sees what is right of it, and no mask is needed.
        S = max(len(ids) for ids in prompt_ids) + L
        ids = torch.zeros(B, S, dtype=torch.int64)
        for row, prompt in zip(ids, prompt_ids):
            row[: len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        first = torch.tensor([len(prompt) for prompt in prompt_ids], device=self.device)
        columns = first[:, None] + torch.arange(L, device=self.device)
        completion_ids = completion_ids.to(self.device)
        ids.scatter_(1, columns, completion_ids)
        targets = torch.full_like(ids, IGNORE)
        targets.scatter_(1, columns - 1, completion_ids.masked_fill(~mask, IGNORE))
        temperature = temperature[:, None].expand(B, S)
        positions, visual = self._layout(prompt_ids, [0] * B, S)
        inputs = dict(position_ids=positions, visual=visual) if visual else {}
        out = self.parts["lm"](ids, targets=targets, temperature=temperature, return_entropy=return_entropy, **inputs)
        if return_entropy:
            return tuple(x.gather(1, columns - 1) for x in out)
        return out.gather(1, columns - 1)

    def _layout(self, prompt_ids, first, S):
        """Positions of B rows of S tokens whose prompts begin in column first[b], and what their pictures put in.

        Without pictures: int64 [B, S] and None. With: M-RoPE's int64 [3, B, S], and ((rows, columns) int64 [n],
        features [n, D], deepstack a list of [n, D]) for `_forward`, n the tokens of all pictures.
        """
        positions = (torch.arange(S) - torch.tensor(first)[:, None]).clamp(min=0)
        seen = [(b, prompt) for b, prompt in enumerate(prompt_ids) if isinstance(prompt, Prompt)]
        if self.takes_images and any(self.image_token in p for p in prompt_ids if not isinstance(p, Prompt)):
            raise ValueError("a prompt has image tokens but no pictures: pass on the prompts that encode returned")
        if not seen:
            return positions.to(self.device), None
        positions = positions.expand(3, -1, -1).clone()
        for b, prompt in seen:
            end = first[b] + len(prompt)
            positions[:, b, first[b] : end] = prompt.positions
            positions[:, b, end:] += int(prompt.positions.max()) + 1 - len(prompt)
        rows = torch.cat([torch.full_like(prompt.where, b) for b, prompt in seen])
        columns = torch.cat([prompt.where + first[b] for b, prompt in seen])
        features = torch.cat([prompt.features for _, prompt in seen])
        deepstack = [torch.cat(layer) for layer in zip(*(prompt.deepstack for _, prompt in seen))]
        return positions.to(self.device), ((rows.to(self.device), columns.to(self.device)), features, deepstack)

    def _temperature(self, temperature, B):
        """T fp32 [B], 1 for greedy rows, and which rows are greedy."""
        if not isinstance(temperature, torch.Tensor):
            temperature = torch.full((B,), float(temperature))
        temperature = temperature.to(self.device, torch.float32)
        if temperature.shape != (B,) or not (temperature >= 0).all():
            raise ValueError(f"temperature must be >= 0, a float or one for each of {B} rows")
        greedy = temperature == 0
        return temperature.masked_fill(greedy, 1.0), greedy

    def save(self, folder, tensors):
        """Write the model (the vision tower too) and its tokenizer in transformers' format, or a PEFT adapter folder
        where there is an adapter.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        from safetensors.torch import save_file

        lm = self.parts["lm"]
        state = {name.removeprefix("lm."): tensor for name, tensor in tensors.items()}
        os.makedirs(folder, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        if getattr(lm, "peft_config", None):
            config = copy.copy(lm.peft_config["default"])
            config.task_type, config.inference_mode, config.base_model_name_or_path = "CAUSAL_LM", True, self.source
            if self.takes_images:  # the names alone would find layers of the vision tower as well
                config.target_modules = rf".*\.language_model\..*\.({'|'.join(LORA_TARGETS)})"
            config.save_pretrained(folder)
            adapter = {f"base_model.model.{name.replace('.default.', '.')}": t for name, t in state.items()}
            save_file(adapter, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
            return
        with torch.device("meta"):
            whole = self.model_class(copy.deepcopy(lm.config))
        if self.takes_images:
            state |= {f"model.visual.{name}": t.cpu() for name, t in self.tower.state_dict().items()}
            for name, content in self.processor_files.items():
                with open(os.path.join(folder, name), "wb") as f:
                    f.write(content)
        # Not strict: a tied head is the embedding under a second name.
        whole.load_state_dict({name: t.to(self.dtype) for name, t in state.items()}, assign=True, strict=False)
        whole.tie_weights()
        whole.generation_config = copy.deepcopy(lm.generation_config)
        try:
            whole.generation_config.validate(strict=True)
        except ValueError:  # sampling options beside do_sample=False, which some versions of transformers do not write
            whole.generation_config.do_sample = True
        whole.save_pretrained(folder, max_shard_size=common.MAX_SHARD_SIZE)


def _stop_ids(lm, tokenizer):
    """Every token that ends a completion: generation_config.json (an int or a list; chat models often have two),
    config.json and the tokenizer name them, and not always the same ones."""
    stop = set()
    config = lm.config.get_text_config()
    for eos in (lm.generation_config.eos_token_id, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        stop |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return sorted(stop - {None})


def _use_best_attention(lm, device, dtype):
    """flash-attn where it is installed and applies, else what transformers chose: PyTorch's own where the architecture
    has it. Returns the name of what is in use."""
    installed = device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn")
    if installed and lm._supports_flash_attn:
        lm.set_attn_implementation("flash_attention_2")
    name = lm.config.get_text_config()._attn_implementation
    return {"flash_attention_2": "flash-attn", "sdpa": "torch scaled_dot_product_attention"}.get(name, name)


def _in_dtype(module, dtype):
    # Not .to(dtype), which would round the frequencies of the rotary embedding as well.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _forward(
    lm,
    softcap,
    ids,
    targets=None,
    temperature=None,
    return_entropy=False,
    cache=None,
    attention_mask=None,
    position_ids=None,
    visual=None,
):
    """What `lm(...)` computes instead of transformers' forward. With targets int64 [B, S]: log-probs fp32 [B, S], and
    entropies if wanted. Without: fp32 logits [B, V] of the last token, keys and values appended to `cache`."""
    inputs = {"input_ids": ids}
    if visual is not None:
        where, features, deepstack = visual  # of Qwen._layout
        embeddings = lm.get_input_embeddings()(ids)
        inputs = {"inputs_embeds": embeddings.index_put(where, features.to(embeddings.dtype))}
        if deepstack:
            seen = torch.zeros_like(ids, dtype=torch.bool).index_put(where, torch.ones_like(where[0], dtype=torch.bool))
            inputs |= {"visual_pos_masks": seen, "deepstack_visual_embeds": deepstack}
    hidden = _decoder(lm)(
        **inputs,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    weight = lm.get_output_embeddings().weight
    hidden = hidden.to(weight.dtype)
    if targets is not None:
        return linear_logp(hidden, weight, targets, temperature, softcap, return_entropy)
    hidden = hidden[:, -1]
    # fp32 logits of 16-bit operands: rounded to bf16 they would be off by up to 0.05 nats.
    if (hidden.is_cuda or hidden.is_meta) and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    return logits if softcap is None else softcap * (logits / softcap).tanh()


class _Layer(DynamicLayer):
    """Keys and values of a decoder layer, in memory for `length` tokens from the first on: DynamicLayer copies all of
    them for every token, which is most of what a large batch moves."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.whole = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)]
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        for whole, new in zip(self.whole, (key_states, value_states)):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)
        return self.keys, self.values


def _cache(config, length):
    """An empty cache for `length` tokens; layers that do not attend to all of them keep transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [_Layer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _uniform(seeds, length):
    """fp64 [B, length] in [0, 1): number j of a row is words 0 and 1 of the Philox counter (j, 0, 0, 0) under the key
    (low, high 32 bits of seed). 48 bits, so that its product with a sum stays below the sum."""
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise TypeError(f"seeds must be int64 [B], got {seeds.dtype} {list(seeds.shape)}")
    counter = torch.arange(length, device=seeds.device)
    high, low, _, _ = philox_words(counter, 0, 0, 0, seeds[:, None] & LOW32, (seeds[:, None] >> 32) & LOW32)
    return ((high << 16) | (low >> 16)).double() * 2.0**-48


def _sample(z, uniform, greedy):
    """Token int64 [B] and its log-prob fp32 [B] under softmax(z), z fp32 [B, V]: the inverse of the cumulative
    distribution at `uniform`, or the largest logit in greedy rows (greedy None: there are none).

    One random number a token; Gumbel-max would take V. First a block of columns is drawn by its mass, then a token in
    it; only these two cumulative sums are fp64, in which the tail of 150,000 tokens is not lost, and not V wide.
    exp and the sum of a block are fp32: the probability of every token, however small, is right to some 1e-6 of it,
    which is what fp32 logits leave of it.
    """
    V = z.shape[1]
    z = z - z.amax(1, keepdim=True)
    p = z.exp()
    whole = p[:, : V // BLOCK * BLOCK].unflatten(1, (V // BLOCK, BLOCK))
    masses = torch.cat([whole.sum(2), p[:, V // BLOCK * BLOCK :].sum(1, keepdim=True)], dim=1).double()
    cumulative = masses.cumsum(1)
    total = cumulative[:, -1:]
    rest = uniform[:, None] * total
    block = torch.searchsorted(cumulative, rest, right=True).clamp(max=masses.shape[1] - 1)  # past the last only if NaN
    rest = (rest - (cumulative - masses).gather(1, block)) / masses.gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=z.device)
    inside = p.gather(1, columns.clamp(max=V - 1)).double().masked_fill(columns >= V, 0.0).cumsum(1)
    # Below the sum, so that no token of probability 0 is drawn.
    rest = rest.clamp(0.0, 1 - 2.0**-50) * inside[:, -1:]
    token = (block * BLOCK + torch.searchsorted(inside, rest, right=True)).clamp(max=V - 1)
    if greedy is not None:
        token = torch.where(greedy[:, None], z.argmax(1, keepdim=True), token)
    return token[:, 0], (z.gather(1, token) - total.log())[:, 0].float()
