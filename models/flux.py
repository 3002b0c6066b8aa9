"""
FLUX.1 (https://github.com/black-forest-labs/flux) as a flow model, on diffusers' own FluxTransformer2DModel and
AutoencoderKL and transformers' CLIP and T5 encoders. What we own is what an RL step touches: noise, schedule, packing,
guidance, velocity.

Latents are B C h w, fp32, normalised; FLUX sees them packed, 2 x 2 latent pixels to one token. FLUX.1-dev has embedded
guidance (one forward); a FLUX-shaped model without it (schnell, tiny-flux) gets true classifier-free guidance against
the empty prompt.
"""

import copy
import importlib.util
import os

import numpy as np
import torch

import models
from kernels.sde_step import philox_normal
from models.cache import EmbeddingCache

# B samples, C h w latent, L text tokens, N = h/2 * w/2 image tokens

# The targets published FLUX recipes train (Flow-GRPO and its forks): every attention projection and both feed-forwards.
LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]

# FLUX.1-dev's dimensions, so that --dry-run can speak about a model that is not on this disk.
FLUX_DEV = dict(
    transformer=dict(num_layers=19, num_single_layers=38, guidance_embeds=True),
    encoder_parameters=4_762_310_656 + 123_060_480,  # T5-XXL encoder, CLIP-L text model
    vae_parameters=83_819_683,
    text_tokens=512,
    vae_scale=8,
)


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
):
    """Load a FluxPipeline folder or hub id as a `Flux`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16).
    lora_rank: 0 trains every parameter of the transformer, else a PEFT adapter of that rank (scale lora_alpha /
    lora_rank). with_reference: under full fine-tuning, keep a frozen copy of the transformer (with LoRA the adapter is
    switched off instead). offload_encoders: text encoders wait in CPU memory and visit the device only to encode (saves
    10 GB for FLUX.1-dev). cache_prompts, cache_folder: see models/cache.py.

    Raises RuntimeError with one message for a gated, missing, unreachable or incomplete model, ValueError for a
    tokenizer without its vocabulary.
    """
    from transformers.utils import logging

    # diffusers imports image processors whose default wants torchvision and says so; nothing here uses them.
    logging.set_verbosity_error()
    from diffusers import FluxPipeline

    folder = source if os.path.isdir(source) else models.hub(source, lambda: FluxPipeline.download(source))
    try:
        pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
        if lora_rank == 0 and dtype != torch.float32:
            # Full fine-tuning trains fp32 masters; taken from the file itself, not from its rounded copy.
            pipeline.transformer = type(pipeline.transformer).from_pretrained(folder, subfolder="transformer")
    except OSError as error:
        raise RuntimeError(f"'{source}' is incomplete, download or save it again: {error}") from None
    _check_vocabulary(source, "tokenizer", pipeline.tokenizer, pipeline.text_encoder)
    _check_vocabulary(source, "tokenizer_2", pipeline.tokenizer_2, pipeline.text_encoder_2)
    return Flux(
        pipeline, device, dtype, lora_rank, lora_alpha, with_reference, offload_encoders, cache_prompts, cache_folder
    )


class Flux:
    """The flow-model contract. `parts` is what is trained, `blocks` what is sharded, checkpointed and compiled one by
    one."""

    def __init__(
        self,
        pipeline,
        device,
        dtype,
        lora_rank=0,
        lora_alpha=0,
        with_reference=False,
        offload_encoders=False,
        cache_prompts=512,
        cache_folder=None,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self.pipeline_class, self.scheduler = type(pipeline), pipeline.scheduler
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
        self.encoder_device = torch.device("cpu") if offload_encoders else self.device
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(self.encoder_device)
        self.text_encoder_2 = pipeline.text_encoder_2.requires_grad_(False).eval().to(self.encoder_device)
        # channels_last: convolutions take half the time on a CPU.
        self.vae = pipeline.vae.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.transformer.config.in_channels // 4
        self.text_tokens = min(512, self.tokenizer_2.model_max_length)
        self.embedded_guidance = pipeline.transformer.config.guidance_embeds
        self.cache = EmbeddingCache(self._encode_rows, cache_prompts, cache_folder)

        transformer = pipeline.transformer
        self.attention = _use_best_attention(transformer, self.device, dtype)
        self.lora = lora_rank > 0
        self.reference_parts = None
        if self.lora:
            add_lora(transformer, lora_rank, lora_alpha)
        else:
            transformer.requires_grad_(True)
            if with_reference:
                self.reference_parts = {"transformer": copy.deepcopy(transformer).to(dtype).requires_grad_(False)}
        self.parts = {"transformer": transformer}

    def blocks(self, part):
        """The repeated blocks of one part (a module out of `parts` or `reference_parts`)."""
        return [*part.transformer_blocks, *part.single_transformer_blocks]

    @torch.no_grad()
    def encode(self, prompts, images=None, negative=None, seeds=None):
        """Prompt embeddings: dict of tensors with a row per prompt: t5 [B, L, D], clip [B, D'], and where the model
        needs true guidance their null rows t5_null, clip_null (of `negative`, default the empty prompt)."""
        cond = self.cache(prompts)
        if not self.embedded_guidance:
            null = self.cache(negative or [""])
            cond.update({f"{k}_null": rows.expand(len(prompts), *rows.shape[1:]) for k, rows in null.items()})
        return {name: rows.to(self.device) for name, rows in cond.items()}

    def condition(self, cond):
        """Trained conditioning; FLUX has none."""
        return cond

    def _encode_rows(self, prompts):
        t5, clip = self.text_encoder_2, self.text_encoder
        ids_2 = _ids(self.tokenizer_2, prompts, self.text_tokens)
        ids = _ids(self.tokenizer, prompts, self.tokenizer.model_max_length)
        for encoder in (t5, clip):
            encoder.to(self.device)
        rows = {"t5": t5(ids_2.to(self.device))[0], "clip": clip(ids.to(self.device)).pooler_output}
        for encoder in (t5, clip):
            encoder.to(self.encoder_device)
        return {name: tensor.to(self.dtype) for name, tensor in rows.items()}

    @torch.no_grad()
    def encode_images(self, images):
        """Images float [0, 1] B 3 H W -> normalised latents fp32 B C h w (the mode of the posterior)."""
        latents = self.vae.encode((images.to(self.device) * 2 - 1).to(self.vae.dtype)).latent_dist.mode().float()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def latent_size(self, height, width):
        """(h, w) of the latent of a height x width picture, in latent pixels. Raises ValueError for sizes FLUX cannot
        pack."""
        if height % (2 * self.vae_scale) or width % (2 * self.vae_scale):
            raise ValueError(f"--resolution: {height} x {width} is not a multiple of {2 * self.vae_scale} pixels")
        return height // self.vae_scale, width // self.vae_scale

    def sigmas(self, num_steps, height, width):
        """The model's own schedule: num_steps + 1 noise levels from 1 to 0, float64, with FLUX's resolution-dependent
        shift."""
        h, w = self.latent_size(height, width)
        config = self.scheduler.config
        base, top = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (top - base)
        mu = config.get("base_shift", 0.5) + slope * (h * w // 4 - base)
        scheduler = type(self.scheduler).from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.double()

    def init_noise(self, seeds, height, width):
        """Standard normal latents fp32 B C h w; row i is a function of seeds[i] (int64 [B]) alone."""
        return philox_normal(seeds.to(self.device), (self.latent_channels, *self.latent_size(height, width)))

    def velocity(self, x, sigma, cond, guidance=(1.0, 1.0)):
        """v = eps - x0 for x B C h w at noise level sigma fp32 [B]; same shape as x.

        guidance = (text, image); image guidance belongs to editing models. Text guidance is embedded where the model
        was distilled for it, else v_null + g (v - v_null), both halves in one batch; gradient flows through both.
        """
        text_guidance = guidance[0]
        if self.embedded_guidance or text_guidance == 1:
            return self._forward(x, sigma, cond["t5"], cond["clip"], text_guidance)
        t5, clip = torch.cat([cond["t5_null"], cond["t5"]]), torch.cat([cond["clip_null"], cond["clip"]])
        v_null, v = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), t5, clip, 1.0).float().chunk(2)
        return v_null + text_guidance * (v - v_null)

    def _forward(self, x, sigma, t5, clip, guidance):
        B, C, h, w = x.shape
        packed = x.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, 4 * C)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
        # Inputs are cast here and not by FSDP, which would round sigma and the rotary tables on the way into every
        # block.
        v = self.parts["transformer"](
            hidden_states=packed.to(self.dtype),
            encoder_hidden_states=t5.to(self.dtype),
            pooled_projections=clip.to(self.dtype),
            timestep=sigma,
            img_ids=image_ids.to(x.device, self.dtype),
            txt_ids=torch.zeros(t5.shape[1], 3, device=x.device, dtype=self.dtype),
            guidance=sigma.new_full((B,), guidance) if self.embedded_guidance else None,
            return_dict=False,
        )[0]
        return v.view(B, h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)

    @torch.no_grad()
    def decode(self, x):
        """Latents B C h w -> images float [0, 1] B 3 H W. At most 4 megapixels go through the decoder at once."""
        z = (x / self.vae.config.scaling_factor + self.vae.config.shift_factor).to(self.vae.dtype)
        pixels = x.shape[-1] * x.shape[-2] * self.vae_scale**2
        images = [self.vae.decode(chunk, return_dict=False)[0] for chunk in z.split(max(1, 4 * 1024**2 // pixels))]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    def save(self, folder, tensors):
        """Write the model in the ecosystem's format: pytorch_lora_weights.safetensors, or a whole diffusers folder.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        state = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        if self.lora:
            config = self.parts["transformer"].peft_config["default"]
            layers = {name.replace(".default.", "."): tensor for name, tensor in state.items()}
            # Without the metadata the stock loader takes alpha = rank, and the picture is another one.
            self.pipeline_class.save_lora_weights(
                folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
            )
            return
        with torch.device("meta"):
            transformer = type(self.parts["transformer"]).from_config(dict(self.parts["transformer"].config))
        transformer.load_state_dict({name: tensor.to(self.dtype) for name, tensor in state.items()}, assign=True)
        self.pipeline_class(
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=transformer,
        ).save_pretrained(folder)


def add_lora(transformer, rank, alpha):
    """Add a PEFT adapter (fp32 weights, gaussian A, zero B, so that the start is the base model) and freeze everything
    else."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every rank must make the same adapter before it is sharded
        transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def _check_vocabulary(source, name, tokenizer, encoder):
    # transformers makes a tokenizer of nothing but special tokens where the files are missing, and says nothing.
    if len(tokenizer) < encoder.config.vocab_size / 2:
        raise ValueError(
            f"'{source}': {name} has {len(tokenizer)} tokens for an encoder of {encoder.config.vocab_size}; "
            f"its files are missing or belong to another model"
        )


def _ids(tokenizer, prompts, length):
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _use_best_attention(transformer, device, dtype):
    """flash-attn where it is installed and applies (CUDA, 16 bit), else PyTorch's own; returns the name of what is in
    use."""
    if device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
        transformer.set_attention_backend("flash")
        return "flash-attn"
    return "torch scaled_dot_product_attention"
