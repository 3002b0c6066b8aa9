"""
FLUX.1 (https://github.com/black-forest-labs/flux) as a flow model, on diffusers' own FluxTransformer2DModel and
AutoencoderKL and transformers' CLIP and T5 encoders. What we own is what an RL step touches: noise, schedule, packing,
guidance, velocity.

Latents are B C h w, fp32, normalised; FLUX sees them packed, 2 x 2 latent pixels to one token. FLUX.1-dev has embedded
guidance (one forward); a FLUX-shaped model without it (schnell, tiny-flux) gets true classifier-free guidance against
the empty prompt.

FLUX.1-Kontext-dev (arXiv 2506.15742) is the same transformer taught to edit: the tokens of a reference image follow the
noise tokens, told apart by the first coordinate of their positions. The reference may have any size, and none is ever
changed here: the stock pipeline scales references to one of 17 sizes of about a megapixel and the output to 1024^2
pixels (`_auto_resize`, `max_area`), and a run at --resolution 512 would be four times as slow and not what was asked
for.
"""

import numpy as np
import torch

import models
from kernels.sde_step import philox_normal
from models import pipeline as common
from models.cache import EmbeddingCache

# B samples, C h w latent (h' w' of a reference image), L text tokens, N = h/2 * w/2 image tokens

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
    train=True,
):
    """Load a FluxPipeline or FluxKontextPipeline folder or hub id as a `Flux`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16).
    lora_rank: 0 trains every parameter of the transformer, else a PEFT adapter of that rank (scale lora_alpha /
    lora_rank). with_reference: under full fine-tuning, keep a frozen copy of the transformer (with LoRA the adapter is
    switched off instead). offload_encoders: text encoders wait in CPU memory and visit the device only to encode (saves
    10 GB for FLUX.1-dev). cache_prompts, cache_folder: see models/cache.py. train: False is a frozen model, all in
    dtype.

    Raises RuntimeError with one message for a gated, missing, unreachable or incomplete model, ValueError for a
    tokenizer without its vocabulary.
    """
    pipeline = common.load(models.pipeline_class(source), source, dtype, train and lora_rank == 0)
    training = (lora_rank, lora_alpha, with_reference)
    return Flux(pipeline, device, dtype, *training, offload_encoders, cache_prompts, cache_folder, train)


class Flux:
    """The flow-model contract. `parts` is what is trained, `blocks` what is sharded, checkpointed and compiled one by
    one. `reference_images` says whether a prompt comes with an image to edit: "none" or, for Kontext, "required"."""

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
        train=True,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self.pipeline_class, self.scheduler = type(pipeline), pipeline.scheduler
        self.components = {name: part for name, part in pipeline.components.items() if name != "transformer"}
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
        self.encoder_device = torch.device("cpu") if offload_encoders else self.device
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(self.encoder_device)
        self.text_encoder_2 = pipeline.text_encoder_2.requires_grad_(False).eval().to(self.encoder_device)
        # channels_last: convolutions take half the time on a CPU.
        self.vae = pipeline.vae.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.transformer.config.in_channels // 4
        self.text_tokens = min(512, self.tokenizer_2.model_max_length)
        self.reference_images = "required" if self.pipeline_class.__name__ == "FluxKontextPipeline" else "none"
        self.embedded_guidance = pipeline.transformer.config.guidance_embeds
        self.cache = EmbeddingCache(self._encode_rows, cache_prompts, cache_folder)

        transformer = pipeline.transformer
        self.attention = common.use_best_attention(transformer, self.device, dtype)
        self.reference_parts = common.make_trainable(
            transformer, dtype, lora_rank, lora_alpha, LORA_TARGETS, with_reference, train
        )
        self.parts = {"transformer": transformer}

    def blocks(self, part):
        """The repeated blocks of one part (a module out of `parts` or `reference_parts`)."""
        return [*part.transformer_blocks, *part.single_transformer_blocks]

    @torch.no_grad()
    def encode(self, prompts, images=None, negative=None, seeds=None):
        """Prompt embeddings: dict of tensors with a row per prompt: t5 [B, L, D], clip [B, D'], where the model needs
        true guidance their null rows t5_null, clip_null (of `negative`, default the empty prompt), and for Kontext
        image fp32 [B, C, h', w'].

        images: float [0, 1] B 3 H' W', the picture that each prompt edits. Raises ValueError for images that the model
        does not take, or lacks.
        """
        if images is not None and self.reference_images == "none":
            raise ValueError(f"{self.pipeline_class.__name__} makes pictures from text and takes no image")
        if images is None and self.reference_images == "required":
            raise ValueError(f"{self.pipeline_class.__name__} edits pictures: every prompt needs an image")
        if images is not None:
            self.latent_size(*images.shape[2:])
            if len(images) != len(prompts):
                raise ValueError(f"expected an image for each of {len(prompts)} prompts, got {len(images)}")
        cond = self.cache(prompts)
        if not self.embedded_guidance:
            null = self.cache(negative or [""])
            cond.update({f"{k}_null": rows.expand(len(prompts), *rows.shape[1:]) for k, rows in null.items()})
        if images is not None:
            cond["image"] = self.encode_images(images)
        return {name: rows.to(self.device) for name, rows in cond.items()}

    def condition(self, cond):
        """Trained conditioning; FLUX has none."""
        return cond

    def _encode_rows(self, prompts):
        t5, clip = self.text_encoder_2, self.text_encoder
        ids_2 = common.token_ids(self.tokenizer_2, prompts, self.text_tokens)
        ids = common.token_ids(self.tokenizer, prompts, self.tokenizer.model_max_length)
        for encoder in (t5, clip):
            encoder.to(self.device)
        rows = {"t5": t5(ids_2.to(self.device))[0], "clip": clip(ids.to(self.device)).pooler_output}
        for encoder in (t5, clip):
            encoder.to(self.encoder_device)
        return {name: tensor.to(self.dtype) for name, tensor in rows.items()}

    @torch.no_grad()
    def encode_images(self, images):
        """Images float [0, 1] B 3 H W -> normalised latents fp32 B C h w (the mode of the posterior). At most 4
        megapixels go through the encoder at once."""
        chunks = (images.to(self.device) * 2 - 1).to(self.vae.dtype).split(max(1, 4 * 1024**2 // images[0, 0].numel()))
        latents = torch.cat([self.vae.encode(chunk).latent_dist.mode() for chunk in chunks]).float()
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

        guidance = (text, image), the second without effect: Kontext has no guidance on its reference. Text guidance is
        embedded where the model was distilled for it, else v_null + g (v - v_null), both halves in one batch and with
        the same reference; gradient flows through both.
        """
        text_guidance, image = guidance[0], cond.get("image")
        if self.embedded_guidance or text_guidance == 1:
            return self._forward(x, sigma, cond["t5"], cond["clip"], image, text_guidance)
        t5, clip = torch.cat([cond["t5_null"], cond["t5"]]), torch.cat([cond["clip_null"], cond["clip"]])
        image = None if image is None else torch.cat([image, image])
        v_null, v = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), t5, clip, image, 1.0).float().chunk(2)
        return v_null + text_guidance * (v - v_null)

    def _forward(self, x, sigma, t5, clip, image, guidance):
        B, C, h, w = x.shape
        tokens, positions = _pack(x, 0)
        if image is not None:
            image_tokens, image_positions = _pack(image, 1)
            tokens, positions = torch.cat([tokens, image_tokens], 1), torch.cat([positions, image_positions])
        # Inputs are cast here and not by FSDP, which would round sigma and the rotary tables on the way into every
        # block.
        v = self.parts["transformer"](
            hidden_states=tokens.to(self.dtype),
            encoder_hidden_states=t5.to(self.dtype),
            pooled_projections=clip.to(self.dtype),
            timestep=sigma,
            img_ids=positions.to(x.device, self.dtype),
            txt_ids=torch.zeros(t5.shape[1], 3, device=x.device, dtype=self.dtype),
            guidance=sigma.new_full((B,), guidance) if self.embedded_guidance else None,
            return_dict=False,
        )[0][:, : h * w // 4]
        return v.reshape(B, h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)

    @torch.no_grad()
    def decode(self, x):
        """Latents B C h w -> images float [0, 1] B 3 H W. At most 4 megapixels go through the decoder at once."""
        z = x / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return common.decode(self.vae, z, self.vae_scale)

    def save(self, folder, tensors):
        """Write the model in the ecosystem's format: pytorch_lora_weights.safetensors, or a whole diffusers folder.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        common.save(folder, self.pipeline_class, self.components, self.parts["transformer"], self.dtype, tensors)


def _pack(x, image):
    """Latents B C h w as tokens [B, N, 4 C], 2 x 2 pixels each, and their positions [N, 3]: (image, row, column)."""
    B, C, h, w = x.shape
    tokens = x.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, 4 * C)
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return tokens, torch.stack([torch.full_like(rows, image), rows, columns], dim=-1).view(-1, 3)
