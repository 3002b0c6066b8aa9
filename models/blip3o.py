"""
Unified models as UniRL-Zero (https://arxiv.org/abs/2510.17937) makes them of BLIP3-o's parts, and MetaQuery
(https://arxiv.org/abs/2504.06256): a Qwen2.5-VL language model reads the prompt and, behind it, learned queries; a
small bidirectional transformer, the connector, turns what it says at the queries into the text of a SANA DiT.

    prompt, picture, queries -> LM -> connector -> SANA -> DC-AE -> picture

`BLIP3o` is a flow model, and its `lm` a language model (models/qwen.py) on the same weights: `model.encode` makes what
a picture is drawn from, `model.lm.encode` what a text is sampled from. What the two kinds of model choose differently
stands side by side in VARIANTS.

A model lives in a folder of its own: config.json (which LM and which SANA, an alias, hub id or folder; one that begins
with a dot is relative to this one), model.safetensors (queries and connector, and the DiT once it was trained), lm/
once the LM was trained. `create` writes an untrained one. After training with LoRA the folder holds adapter.safetensors
and the name of the model that it belongs to, into which `load` merges it.
"""

import copy
import functools
import json
import os
import re
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import nn

import models
from kernels.sde_step import fold_seed, philox_normal
from models import parallel, qwen, sana
from models import pipeline as common

# B samples, C h w latent, L tokens of a prompt (padded on the right), Q queries, S = L + Q, n tokens of its picture,
# D width of the LM, D' width of the DiT's text

# What the language model reads. {} is the prompt; a picture stands before the text of its turn. Worded as UniRL-Zero's
# pretraining has it ("generate image", "folllowing" and an image end token that does not exist corrected there), and
# the same at pretraining, RL and inference, where UniRL-Zero has three forms.
T2I = "Please generate an image based on the following caption: {}"
EDIT = "Please edit the given image based on the following instruction: {}"
# Refine, then draw: the language model's answer to this, see `refined`, is the prompt of the picture.
REFINE = (
    "Rewrite the following prompt so that an image generator draws exactly what it asks for: keep every object, "
    "number, colour and position, and add detail. Put the new prompt between <answer> and </answer>: {}"
)
# The same for edits; the language model sees the picture.
REFINE_EDIT = (
    "Rewrite the following instruction for an edit of this image: keep its intent, say exactly what changes and how, "
    "and that all else stays. Put the new instruction between <answer> and </answer>: {}"
)
# MetaQuery's instruction in our words, which are fewer.
DESCRIBE = "Describe the given image or caption in detail and in your own words."

VARIANTS = {
    "blip3o": dict(
        system=None,
        t2i=T2I,
        edit=EDIT,
        turn="<|im_end|>\n",  # behind the header of the assistant's turn: the queries follow its end
        query_sets=2,  # pictures from text, and edits
        begin=0,
        query_std=1.0,
        reference=True,  # the picture to edit also reaches the DiT, as latents
        null="zeros",  # null text: no output of the connector; null picture: zero latents
        connector=dict(
            num_layers=12, head_dim=256, ff_mult=2, rope=False, out_bias=True, ff_bias=True, projection="linear"
        ),
    ),
    "metaquery": dict(
        system=DESCRIBE,
        t2i="{}",
        edit="{}",
        turn="\n",  # the queries stand inside of the assistant's turn
        query_sets=1,
        begin=1,  # a learned token that announces them
        query_std=0.02,  # as Qwen's embeddings begin (our choice)
        reference=False,
        null="caption",  # null text: the empty caption, through LM and connector; null picture: a black one
        connector=dict(
            num_layers=24, head_dim=64, ff_mult=4, rope=True, out_bias=False, ff_bias=False, projection="mlp"
        ),
    ),
}
REFERENCE_NOISE = 0.2  # share of noise in the latents of the picture to edit
REFERENCE = 0x0EF  # second key of the seed of that noise, which must not be the noise that sampling starts from
PAD = 32  # prompts are padded to multiples of this, so that few shapes occur


def refined(text):
    """The prompt in an answer to REFINE or REFINE_EDIT: what stands in the last <answer> </answer>, else all of it
    without tags."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return (found[-1] if found else re.sub(r"</?answer>", "", text)).strip()


def create(
    folder,
    lm_source,
    sana_source,
    variant="blip3o",
    num_queries=256,
    image_tokens=576,
    num_layers=None,
    head_dim=None,
    query_std=None,
    seed=0,
):
    """Write the folder of an untrained model: random queries and connector on a Qwen2.5-VL and a SANA, each an alias,
    folder or hub id that must stay where it is.

    variant: of VARIANTS, else ValueError. image_tokens: at most so many tokens of a picture to edit reach the LM, in
    `encode`. num_layers, head_dim: of the connector, query_std: of the random queries, where not the variant's. The
    same seed gives the same weights.
    """
    from diffusers import SanaTransformer2DModel
    from safetensors.torch import save_file
    from transformers import AutoConfig

    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}': expected one of {', '.join(VARIANTS)}")
    names = {}
    for key, name in (("lm", lm_source), ("sana", sana_source)):
        names[key] = os.path.abspath(name) if os.path.isdir(name) else name
    lm, dit = models.folder_or_id(names["lm"], models.LM_ALIASES), models.folder_or_id(names["sana"])
    width = models.hub(lm, lambda: AutoConfig.from_pretrained(lm)).get_text_config().hidden_size
    caption = models.hub(dit, lambda: SanaTransformer2DModel.load_config(dit, subfolder="transformer"))
    config = dict(
        model_type=variant,
        **names,
        num_queries=num_queries,
        image_tokens=image_tokens,
        width=width,
        out_width=caption["caption_channels"],
        num_layers=num_layers or VARIANTS[variant]["connector"]["num_layers"],
        head_dim=head_dim or VARIANTS[variant]["connector"]["head_dim"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = dict(zip(("queries", "connector"), new_parts(config)))
    if query_std is not None:
        parts["queries"].weight.data *= query_std / VARIANTS[variant]["query_std"]
    os.makedirs(folder, exist_ok=True)
    tensors = {f"{key}.{name}": t for key, part in parts.items() for name, t in part.state_dict().items()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    _write_config(folder, config)


def new_parts(config):
    """Random queries and connector for a config.json."""
    variant = VARIANTS[config["model_type"]]
    length = variant["begin"] + config["num_queries"]
    queries = Queries(variant["query_sets"], length, config["width"], variant["query_std"])
    sizes = {name: config[name] for name in ("width", "out_width", "num_layers", "head_dim")}
    return queries, Connector(**variant["connector"] | sizes)


def load(
    source,
    device,
    dtype,
    lora_rank=0,
    lora_alpha=0,
    with_reference=False,
    offload_encoders=False,
    cache_prompts=512,
    cache_folder=None,
    train_dm=True,
    train_lm=False,
):
    """Load a folder of `create` or `save` as a `BLIP3o`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16). train_dm: queries,
    connector and DiT are trained. train_lm: the language model is. lora_rank: 0 trains every parameter of those, else
    PEFT adapters of that rank (scale lora_alpha / lora_rank), and an offset of the queries. with_reference: under full
    fine-tuning, keep a frozen copy of what is trained. cache_prompts, cache_folder: not used, `encode` of a prompt is
    its tokens.

    Raises RuntimeError with one message for a missing, unreachable or incomplete model, ValueError for what is not such
    a folder, a language model other than Qwen2.5-VL, and offload_encoders: the language model is in every gradient.
    """
    if offload_encoders:
        raise ValueError("--offload-encoders: a unified model trains through its language model, which has to stay")
    folder, adapters = os.path.abspath(source), []
    config = _read_config(folder)
    while "base" in config:
        scale = config["lora_alpha"] / config["lora_rank"]
        adapters.insert(0, (scale, _read_tensors(os.path.join(folder, "adapter.safetensors"))))
        folder = os.path.abspath(models.folder_or_id(config["base"]))
        config = _read_config(folder)
    lm_source = _source(folder, config["lm"], models.LM_ALIASES)
    if models.model_type(lm_source) != "qwen2_5_vl":
        raise ValueError(f"'{source}': its language model '{lm_source}' is no Qwen2.5-VL; nothing else is supported")
    lora = dict(lora_rank=lora_rank, lora_alpha=lora_alpha, with_reference=with_reference) if train_lm else {}
    # What adapters change is fp32 until it has all of them.
    lm = qwen.load(lm_source, device, dtype, **lora, train=train_lm or bool(adapters))

    tensors = _read_tensors(os.path.join(folder, "model.safetensors"))
    trained = any(key.startswith("transformer.") for key in tensors)
    transformer, vae, scheduler = _load_sana(_source(folder, config["sana"], models.ALIASES), dtype, not trained)
    if VARIANTS[config["model_type"]]["reference"]:
        transformer.patch_embed = ReferencePatchEmbed(transformer.patch_embed)
    with torch.random.fork_rng(devices=[]):
        queries, connector = new_parts(config)
    parts = {"transformer": transformer, "queries": queries, "connector": connector}
    for name, part in parts.items():
        state = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        if state or name != "transformer":
            missing, unexpected = part.load_state_dict(state, strict=False)
            if missing or unexpected:
                raise RuntimeError(
                    f"'{folder}' does not fit its config.json: {len(missing)} weights of {name} are missing, "
                    f"{len(unexpected)} are not known, first {[*missing, *unexpected][0]}"
                )
    lm_copies = [lm.parts["lm"], *(lm.reference_parts or {}).values()]
    for scale, tensors in adapters:
        for name, part in [*parts.items(), *(("lm", lm_copy) for lm_copy in lm_copies)]:
            _merge(part, name, tensors, scale)
    return BLIP3o(
        config,
        os.path.abspath(source),
        folder,
        lm,
        parts,
        vae,
        scheduler,
        device,
        dtype,
        lora_rank,
        lora_alpha,
        with_reference,
        train_dm,
        train_lm,
    )


def _load_sana(source, dtype, with_weights):
    """DiT in fp32, autoencoder in dtype and scheduler of a SANA folder or hub id: not its 5 GB of text encoder, nor,
    without `with_weights`, the weights of the DiT."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaTransformer2DModel,
    )

    def read():
        # Any of these classes reads the configuration of any other.
        kind = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler")["_class_name"]
        euler = kind == "FlowMatchEulerDiscreteScheduler"
        scheduler = FlowMatchEulerDiscreteScheduler if euler else DPMSolverMultistepScheduler
        if with_weights:
            transformer = SanaTransformer2DModel.from_pretrained(source, subfolder="transformer")
        else:
            config = SanaTransformer2DModel.load_config(source, subfolder="transformer")
            with torch.random.fork_rng(devices=[]):
                transformer = SanaTransformer2DModel.from_config(config)
        return (
            transformer,
            AutoencoderDC.from_pretrained(source, subfolder="vae", dtype=dtype),
            sana.euler(scheduler.from_pretrained(source, subfolder="scheduler")),
        )

    try:
        return read() if os.path.isdir(source) else models.hub(source, read)
    except OSError as error:
        raise RuntimeError(f"'{source}' is incomplete, download or save it again: {error}") from None


def _source(folder, name, aliases):
    return os.path.join(folder, name) if name.startswith(".") else models.folder_or_id(name, aliases)


def _read_config(folder):
    config = models.unified(folder)
    if config is None:
        raise ValueError(f"'{folder}' is no folder of a unified model: its config.json must say blip3o or metaquery")
    return config


def _write_config(folder, config):
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def _read_tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{path} is missing or damaged, save it again ({error})") from None


@torch.no_grad()
def _merge(part, name, tensors, scale):
    """Add what of an adapter's tensors belongs to `part`, whose name is `name`, to its weights."""
    for key, tensor in tensors.items():
        if key == f"{name}.delta":
            part.weight += tensor.to(part.weight)
        elif key.startswith(f"{name}.") and ".lora_A." in key:
            layer = part.get_submodule(key.removeprefix(f"{name}.").partition(".lora_A.")[0])
            weight = getattr(layer, "base_layer", layer).weight
            change = tensors[key.replace(".lora_A.", ".lora_B.")].float() @ tensor.float() * scale
            weight += change.to(weight)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


class Queries(nn.Module):
    """`sets` sets of `length` learned embeddings, in one parameter [sets * length, D]: what a batch does not use has a
    zero gradient rather than none, so that ranks with other tasks reduce the same tensors."""

    def __init__(self, sets, length, width, std):
        super().__init__()
        self.length = length
        self.weight = nn.Parameter(torch.randn(sets * length, width) * std)
        self.delta, self.adapted = None, True

    def forward(self):
        if self.delta is None or not self.adapted:
            return self.weight.clone()  # under FSDP the parameter itself is gone after the forward
        return self.weight + self.delta.to(self.weight.dtype)

    def add_adapter(self):
        """Freeze the embeddings and train an offset, zero at first: what a LoRA adapter is to a matrix."""
        self.weight.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(self.weight.shape, device=self.weight.device))

    def disable_adapters(self):
        self.adapted = False

    def enable_adapters(self):
        self.adapted = True


class Connector(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Pre-norm transformer without a causal mask over the hidden states of the queries, [B, Q, D] -> [B, Q, D'].

    12 layers at width 2048 and D' = 2304 are 508.3 M parameters, as BLIP3o's. rope, out_bias, ff_bias, projection: see
    VARIANTS.
    """

    @register_to_config
    def __init__(self, width, out_width, num_layers, head_dim, ff_mult, rope, out_bias, ff_bias, projection):
        super().__init__()
        blocks = [ConnectorBlock(width, head_dim, ff_mult * width, rope, out_bias, ff_bias) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        if projection == "linear":
            self.out = nn.Linear(width, out_width)
        else:
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.014)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
            scale = nn.RMSNorm(out_width, eps=1e-6)
            nn.init.constant_(scale.weight, 5.5**0.5)  # SANA was trained on texts of about that size
            gelu, last = nn.GELU(approximate="tanh"), nn.Linear(out_width, out_width)
            self.out = nn.Sequential(nn.Linear(width, out_width), gelu, last, scale)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class ConnectorBlock(nn.Module):
    def __init__(self, width, head_dim, ff_dim, rope, out_bias, ff_bias):
        super().__init__()
        self.head_dim, self.rope = head_dim, rope
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)
        self.o_proj = nn.Linear(width, width, bias=out_bias)
        self.gate_proj, self.up_proj = (nn.Linear(width, ff_dim, bias=ff_bias) for _ in range(2))
        self.down_proj = nn.Linear(ff_dim, width, bias=ff_bias)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = _rotate(q), _rotate(k)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def _rotate(x):
    """Rotary embedding of x [B, heads, Q, H] at positions 0 .. Q - 1, halves paired as in Qwen2, with the base that is
    Qwen2Config's default (our choice)."""
    Q, H = x.shape[-2:]
    frequencies = 10_000.0 ** (-torch.arange(0, H, 2, device=x.device, dtype=torch.float32) / H)
    angles = torch.arange(Q, device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class ReferencePatchEmbed(nn.Module):
    """SANA's patch embedding of x [B, C, h, w] or, behind each other, of x and the latents of a picture to edit
    [B, 2 C, h, w]. At first the picture changes nothing: ref_patch_embed is a copy of patch_embed, ref_linear zero."""

    def __init__(self, patch_embed):
        super().__init__()
        self.patch_embed, self.ref_patch_embed = patch_embed, copy.deepcopy(patch_embed)
        width = patch_embed.proj.out_channels
        self.ref_linear = nn.Linear(width, width)
        nn.init.zeros_(self.ref_linear.weight)
        nn.init.zeros_(self.ref_linear.bias)

    def forward(self, x):
        x, reference = x.chunk(2, dim=1)
        return self.patch_embed(x) + self.ref_linear(self.ref_patch_embed(reference))


def _forward(lm, forward, ids, inserted=None, **inputs):
    """What `lm(...)` computes: models/qwen.py's forward or, with `inserted`, the last hidden states [B, S, D] of ids
    [B, S] whose embeddings at (rows, columns) are those of `inserted` = ((rows, columns), [B, m, D]). No mask: behind
    a row's queries is only padding, which nothing sees."""
    if inserted is None:
        return forward(ids, **inputs)
    where, features = inserted
    embeddings = lm.get_input_embeddings()(ids)
    embeddings = embeddings.index_put(where, features.to(embeddings.dtype))
    return qwen._decoder(lm)(inputs_embeds=embeddings, use_cache=False, **inputs).last_hidden_state


# ----------------------------------------------------------------------------------------------------------------------


class BLIP3o(sana.Sana):
    """The flow-model contract; `lm` has the language-model contract. `parts` are transformer (the DiT), queries,
    connector and lm, of which what is not trained is frozen, in dtype; `reference_parts` has only those that are. For
    the reference of log-probs call parallel.reference(model.lm). `scheduler.sigmas` are the 1,000 noise levels of
    SANA's own schedule, from which MetaQuery draws uniformly in training."""

    reference_images = "optional"
    embedded_guidance = False

    def __init__(
        self,
        config,
        source,
        folder,
        lm,
        parts,
        vae,
        scheduler,
        device,
        dtype,
        lora_rank=0,
        lora_alpha=0,
        with_reference=False,
        train_dm=True,
        train_lm=False,
    ):
        # folder: the base of `source`, if that is an adapter; config.json is its.
        self.config, self.source, self.folder, self.lm = config, source, folder, lm
        self.variant, self.device, self.dtype = VARIANTS[config["model_type"]], torch.device(device), dtype
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.scheduler, self.vae = scheduler, vae.requires_grad_(False).eval().to(self.device)
        self.vae_scale = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        self.latent_channels = parts["transformer"].config.in_channels
        self.attention = f"{lm.attention} in the language model; linear self-attention in the DiT"
        self.turn_ids = lm.tokenizer.encode(self.variant["turn"])
        self.num_learned = parts["queries"].length
        # The LM as `encode` uses it: pictures have a fixed number of tokens at most, whatever their size.
        self.eyes = copy.copy(lm)
        self.eyes.image_processor = eyes = copy.copy(lm.image_processor)
        limit = config["image_tokens"] * (eyes.patch_size * eyes.merge_size) ** 2
        shortest, longest = min(eyes.size["shortest_edge"], limit), min(eyes.size["longest_edge"], limit)
        eyes.size = type(eyes.size)(shortest_edge=shortest, longest_edge=longest)

        for part in parts.values():
            part.eval()
        references = {}
        if train_dm and lora_rank == 0:
            for name, part in parts.items():
                part.requires_grad_(True)
                if with_reference:
                    references[name] = qwen._in_dtype(copy.deepcopy(part).requires_grad_(False), dtype)
        else:
            for part in parts.values():
                qwen._in_dtype(part.requires_grad_(False), dtype)
        if train_dm and lora_rank > 0:
            common.add_lora(parts["transformer"], lora_rank, lora_alpha, sana.LORA_TARGETS)
            common.add_lora(parts["connector"], lora_rank, lora_alpha, qwen.LORA_TARGETS)
            parts["queries"].add_adapter()
        language = lm.parts["lm"]
        if not train_lm:
            qwen._in_dtype(language.requires_grad_(False), dtype)
        references |= lm.reference_parts or {}
        for module in (language, *(lm.reference_parts or {}).values()):
            module.forward = functools.partial(_forward, module, module.forward)
        self.parts = self.whole = {**parts, "lm": language}
        self.reference_parts = references or None
        for part in self.parts.values():
            if not isinstance(part, Queries) and not getattr(part, "peft_config", None):
                # parallel.reference switches off the adapters of every part; this one has none.
                part.disable_adapters = part.enable_adapters = _nothing

    def blocks(self, part):
        """The repeated blocks of one part (a module out of `parts` or `reference_parts`)."""
        if isinstance(part, Queries):
            return []
        if isinstance(part, Connector):
            return list(part.blocks)
        return list(part.transformer_blocks) if hasattr(part, "transformer_blocks") else self.lm.blocks(part)

    @torch.no_grad()
    def encode(self, prompts, images=None, negative=None, seeds=None):
        """What pictures are drawn from: dict of tensors with a row per prompt. Tokens and positions of what the LM
        reads: ids int64 [B, L], length [B], positions [B, 3, S]; with images their features in the LM, picture
        [B, n, D] and where [B, n], and for BLIP3o noisy latents, reference fp32 [B, C, h, w]. The same with _null for
        the null rows of guidance where these need the LM (MetaQuery, or `negative`), and for MetaQuery with _image for
        the null text with the picture; leave them out of what you pass to `condition` where nothing is guided.

        prompts: str, or a conversation: a list of chat messages, drawn as it stands. images: float [0, 1] B 3 H W, of
        the size of the pictures to draw. negative: null text, one or one per prompt. seeds: int64 [B], of the noise in
        the reference (default: 0 for all). Raises ValueError for prompts that do not fit into the LM's context.
        """
        B = len(prompts)
        if images is not None:
            self.latent_size(*images.shape[2:])
            if len(images) != B:
                raise ValueError(f"expected an image for each of {B} prompts, got {len(images)}")
        pictures = None if images is None else _to_pil(images)
        cond = self._context(prompts, pictures)
        caption, null = self.variant["null"] == "caption", list(negative or [""])
        null = null * B if len(null) == 1 and pictures else null
        if caption and pictures:
            cond |= {f"{name}_image": rows for name, rows in self._context(null, pictures).items()}
            pictures = [Image.new("RGB", picture.size) for picture in pictures]
        if caption or negative:
            rows = self._context(null, pictures)
            cond |= {f"{name}_null": t.expand(B, *t.shape[1:]) for name, t in rows.items()}
        if images is not None and self.variant["reference"]:
            latents = self.encode_images(images)
            seeds = torch.zeros(B, dtype=torch.int64) if seeds is None else seeds
            noise = philox_normal(fold_seed(seeds.to(self.device), REFERENCE), latents.shape[1:])
            cond["reference"] = (1 - REFERENCE_NOISE) * latents + REFERENCE_NOISE * noise
        return {name: rows.to(self.device) for name, rows in cond.items()}

    def _context(self, prompts, pictures):
        """What the LM reads for each prompt, as tensors; see `encode`. Positions are Qwen2.5-VL's own, of pictures in
        three dimensions, and the queries go on counting (UniRL-Zero counts pictures as text, which the LM never
        learned)."""
        messages = [self._messages(prompt, pictures is not None) for prompt in prompts]
        rows = self.eyes.encode(messages, images=pictures)
        lengths = [len(row) + len(self.turn_ids) for row in rows]
        L = -(-max(lengths) // PAD) * PAD
        ids, positions = torch.zeros(len(rows), L, dtype=torch.int64), []
        for out, row, length in zip(ids, rows, lengths):
            if length + self.num_learned > self.lm.context:
                raise ValueError(
                    f"a prompt of {length} tokens and {self.num_learned} queries do not fit into the context of "
                    f"{self.lm.context} tokens"
                )
            out[:length] = torch.tensor([*row, *self.turn_ids])
            seen = row.positions if pictures else torch.arange(len(row)).expand(3, -1)
            following = int(seen.max()) + 1 + torch.arange(L + self.num_learned - len(row))
            positions.append(torch.cat([seen, following.expand(3, -1)], dim=1))
        cond = {"ids": ids, "length": torch.tensor(lengths), "positions": torch.stack(positions)}
        if pictures:
            cond |= {"picture": torch.stack([row.features for row in rows])}
            cond |= {"where": torch.stack([row.where for row in rows])}
        return cond

    def _messages(self, prompt, has_picture):
        if not isinstance(prompt, str):
            return prompt
        text = self.variant["edit" if has_picture else "t2i"].format(prompt)
        content = [{"type": "image"}, {"type": "text", "text": text}] if has_picture else text
        system = [{"role": "system", "content": self.variant["system"]}] if self.variant["system"] else []
        return [*system, {"role": "user", "content": content}]

    def condition(self, cond):
        """Trained conditioning: text [B, Q, D'] out of LM and connector, with the gradient of queries, connector and
        what of the LM is trained; text_null, and for MetaQuery's edits text_image, for guidance; reference as it is.

        Dropped conditions of pretraining: BLIP3o's text and reference become zeros, here; MetaQuery's empty captions
        and black pictures go into `encode`."""
        out = {"text": self._text(cond, "")}
        if "ids_null" in cond:
            out["text_null"] = self._text(cond, "_null")
        elif self.variant["null"] == "zeros":
            out["text_null"] = torch.zeros_like(out["text"])
        if "ids_image" in cond:
            out["text_image"] = self._text(cond, "_image")
        if "reference" in cond:
            out["reference"] = cond["reference"]
        return out

    def _text(self, cond, kind):
        ids, length, positions = (cond[f"{name}{kind}"] for name in ("ids", "length", "positions"))
        edits, B = f"picture{kind}" in cond, len(ids)
        if kind == "_null" and B > 1 and not edits and (ids == ids[:1]).all():
            # Null texts are alike but for those that were asked for one by one.
            return self._text({name: rows[:1] for name, rows in cond.items()}, kind).expand(B, -1, -1)
        queries, Q = self._part("queries")(), self.num_learned
        queries = queries[len(queries) - Q :] if edits else queries[:Q]
        columns = length[:, None] + torch.arange(Q, device=ids.device)
        features, where = queries.expand(B, -1, -1), columns
        if edits:
            features = torch.cat([cond[f"picture{kind}"].to(features.dtype), features], dim=1)
            where = torch.cat([cond[f"where{kind}"], columns], dim=1)
        rows = torch.arange(B, device=ids.device)[:, None]
        hidden = self._part("lm")(
            F.pad(ids, (0, Q)), inserted=((rows, where), features), position_ids=positions.transpose(0, 1)
        )
        return self._part("connector")(hidden[rows, columns[:, self.variant["begin"] :]].to(self.dtype))

    def _part(self, name):
        # The reference policy has parts of its own only where something was trained.
        return self.parts.get(name, self.whole[name])

    def velocity(self, x, sigma, cond, guidance=(1.0, 1.0)):
        """v = eps - x0 for x B C h w at noise level sigma fp32 [B]; same shape as x. cond: of `condition`.

        guidance = (text, image); 1 = off, all terms in one batch, and one forward where nothing is guided. From text:
        v_0 + text (v - v_0). Edits, after InstructPix2Pix (https://arxiv.org/abs/2211.09800, eq. 3):
        v_00 + image (v_0i - v_00) + text (v - v_0i), v_0i of the null text with the picture, v_00 of neither.
        """
        text_guidance, image_guidance = guidance
        reference = cond.get("reference")
        terms = [(cond["text"], reference)]
        if "reference" not in cond and "text_image" not in cond:
            image_guidance = 1.0
        if text_guidance != 1 or image_guidance != 1:
            terms.insert(0, (cond["text_image"] if "text_image" in cond else cond["text_null"], reference))
        if image_guidance != 1:
            terms.insert(0, (cond["text_null"], None if reference is None else torch.zeros_like(reference)))
        k = len(terms)
        text = torch.cat([term for term, _ in terms])
        reference = None if reference is None else torch.cat([term for _, term in terms])
        v = self._forward(torch.cat([x] * k), torch.cat([sigma] * k), text, reference)
        if k == 1:
            return v
        *unguided, v_null, v = v.float().chunk(k)
        guided = v_null + text_guidance * (v - v_null)
        return guided + (image_guidance - 1) * (v_null - unguided[0]) if unguided else guided

    def _forward(self, x, sigma, text, reference):
        if self.variant["reference"]:
            # Zeros where there is no picture: the same parameters are in every gradient, whatever the task.
            x = torch.cat([x, torch.zeros_like(x) if reference is None else reference.to(x.dtype)], dim=1)
        return super()._forward(x, sigma, text, None)

    def save(self, folder, tensors):
        """Write a folder that `load` reads: all that was trained in dtype or, after training with LoRA, the adapters
        and the name of the model that they belong to. Frozen parts stay where config.json says that they are.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        from safetensors.torch import save_file

        os.makedirs(folder, exist_ok=True)
        if self.lora_rank > 0:
            tensors = {name.replace(".default.", "."): t.contiguous() for name, t in tensors.items()}
            save_file(tensors, os.path.join(folder, "adapter.safetensors"), metadata={"format": "pt"})
            config = dict(model_type=self.config["model_type"], base=self.source)
            config |= dict(lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
            return _write_config(folder, config | dict(adapts=sorted({name.partition(".")[0] for name in tensors})))
        config = dict(self.config)
        if self.source != self.folder:
            # An adapter was merged into parts of which some may be frozen, and full tensors of those are nowhere else.
            whole = load(self.source, "cpu", self.dtype, train_lm=True)
            tensors = {n: p.detach() for n, p in parallel.trained(whole.parts).items()} | tensors
        language = {name: t for name, t in tensors.items() if name.startswith("lm.")}
        ours = {name: t.to(self.dtype).contiguous() for name, t in tensors.items() if name not in language}
        if language:
            self.lm.save(os.path.join(folder, "lm"), language)
            config["lm"] = "./lm"
        for name in ("lm", "sana"):
            source = os.path.join(self.folder, config[name])
            if config[name].startswith("./") and not (name == "lm" and language):
                shutil.copytree(source, os.path.join(folder, config[name]))
            elif config[name].startswith("../"):
                config[name] = os.path.abspath(source)
        if ours:
            save_file(ours, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        else:
            shutil.copyfile(os.path.join(self.folder, "model.safetensors"), os.path.join(folder, "model.safetensors"))
        _write_config(folder, config)


def _nothing():
    pass


def _to_pil(images):
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
