"""
Stable Diffusion 3 and 3.5 (arXiv 2403.03206) as a flow model, on diffusers' own SD3Transformer2DModel and AutoencoderKL
and transformers' two CLIP encoders and T5. What we own is what an RL step touches: noise, schedule, guidance, velocity.

Latents are B C h w, fp32, normalised; the transformer cuts them into 2 x 2 patches itself. Guidance is true
classifier-free guidance against the empty prompt. A folder without T5 (text_encoder_3) works, with zeros in its place,
as in the stock pipeline.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kernels.sde_step import philox_normal
from models import pipeline as common
from models.cache import EmbeddingCache

# B samples, C h w latent, L text tokens (CLIP's, then T5's), D the width of T5

# The targets published SD3 recipes train (Flow-GRPO): the joint attention, not SD3.5's second one (attn2).
LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]

SCHEDULES = ("stock", "single")


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
    sigma_schedule="",
    train=True,
):
    """Load a StableDiffusion3Pipeline folder or hub id as an `Sd3`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16).
    lora_rank: 0 trains every parameter of the transformer, else a PEFT adapter of that rank (scale lora_alpha /
    lora_rank). with_reference: under full fine-tuning, keep a frozen copy of the transformer (with LoRA the adapter is
    switched off instead). offload_encoders: text encoders wait in CPU memory and visit the device only to encode (saves
    11 GB for SD3 in bf16). cache_prompts, cache_folder: see models/cache.py. sigma_schedule: "stock" (or "") or
    "single", see Sd3.sigmas. train: False is a frozen model, all in dtype.

    Raises RuntimeError with one message for a gated, missing, unreachable or incomplete model, ValueError for a
    tokenizer without its vocabulary or an unknown schedule.
    """
    pipeline = common.load("StableDiffusion3Pipeline", source, dtype, train and lora_rank == 0)
    training = (lora_rank, lora_alpha, with_reference)
    return Sd3(pipeline, device, dtype, *training, offload_encoders, cache_prompts, cache_folder, sigma_schedule, train)


class Sd3:
    """The flow-model contract. `parts` is what is trained, `blocks` what is sharded, checkpointed and compiled one by
    one."""

    reference_images = "none"

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
        sigma_schedule="",
        train=True,
    ):
        self.sigma_schedule = sigma_schedule or "stock"
        if self.sigma_schedule not in SCHEDULES:
            raise ValueError(f"unknown sigma schedule '{sigma_schedule}': expected one of {', '.join(SCHEDULES)}")
        self.device, self.dtype = torch.device(device), dtype
        self.pipeline_class, self.scheduler = type(pipeline), pipeline.scheduler
        self.components = {name: part for name, part in pipeline.components.items() if name != "transformer"}
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
        self.tokenizer_3 = pipeline.tokenizer_3
        self.encoder_device = torch.device("cpu") if offload_encoders else self.device
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(self.encoder_device)
        self.text_encoder_2 = pipeline.text_encoder_2.requires_grad_(False).eval().to(self.encoder_device)
        self.text_encoder_3 = pipeline.text_encoder_3
        if self.text_encoder_3 is not None:
            self.text_encoder_3.requires_grad_(False).eval().to(self.encoder_device)
        # channels_last: convolutions take half the time on a CPU.
        self.vae = pipeline.vae.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)

        transformer, config = pipeline.transformer, pipeline.transformer.config
        self.latent_channels, self.patch_size = config.in_channels, config.patch_size
        self.text_width, self.max_patches = config.joint_attention_dim, config.pos_embed_max_size
        # T5's tokens; the stock pipeline's default, also for the zeros in place of T5.
        self.text_tokens = min(256, self.tokenizer_3.model_max_length) if self.text_encoder_3 is not None else 256
        self.embedded_guidance = False
        self.cache = EmbeddingCache(self._encode_rows, cache_prompts, cache_folder)

        # SD3's attention calls PyTorch's own, whichever backend diffusers is told to use.
        self.attention = "torch scaled_dot_product_attention"
        # A buffer, so FSDP does not cast it: rounded here, the masters, their reference and the export have the same.
        transformer.pos_embed.pos_embed = transformer.pos_embed.pos_embed.to(dtype)
        self.reference_parts = common.make_trainable(
            transformer, dtype, lora_rank, lora_alpha, LORA_TARGETS, with_reference, train
        )
        self.parts = {"transformer": transformer}

    def blocks(self, part):
        """The repeated blocks of one part (a module out of `parts` or `reference_parts`)."""
        return [*part.transformer_blocks]

    @torch.no_grad()
    def encode(self, prompts, images=None, negative=None, seeds=None):
        """Prompt embeddings: dict of tensors with a row per prompt: text [B, L, D], pooled [B, D'], and their null rows
        text_null, pooled_null (of `negative`, default the empty prompt). Raises ValueError for images."""
        if images is not None:
            raise ValueError("Stable Diffusion 3 is a text-to-image model and takes no images")
        cond = self.cache(prompts)
        null = self.cache(negative or [""])
        cond.update({f"{k}_null": rows.expand(len(prompts), *rows.shape[1:]) for k, rows in null.items()})
        return {name: rows.to(self.device) for name, rows in cond.items()}

    def condition(self, cond):
        """Trained conditioning; SD3 has none."""
        return cond

    def _encode_rows(self, prompts):
        encoders = [e for e in (self.text_encoder, self.text_encoder_2, self.text_encoder_3) if e is not None]
        for encoder in encoders:
            encoder.to(self.device)
        hidden, pooled = [], []
        for encoder, tokenizer in ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)):
            ids = common.token_ids(tokenizer, prompts, self.tokenizer.model_max_length)
            output = encoder(ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        if self.text_encoder_3 is None:
            t5 = hidden[0].new_zeros(len(prompts), self.text_tokens, self.text_width)
        else:
            ids = common.token_ids(self.tokenizer_3, prompts, self.text_tokens)
            t5 = self.text_encoder_3(ids.to(self.device))[0]
        for encoder in encoders:
            encoder.to(self.encoder_device)
        # The CLIP encoders stand side by side in one row of tokens, padded with zeros to T5's width, then come T5's.
        clip = torch.cat(hidden, dim=-1)
        text = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=-2)
        return {"text": text.to(self.dtype), "pooled": torch.cat(pooled, dim=-1).to(self.dtype)}

    @torch.no_grad()
    def encode_images(self, images):
        """Images float [0, 1] B 3 H W -> normalised latents fp32 B C h w (the mode of the posterior). At most 4
        megapixels go through the encoder at once."""
        chunks = (images.to(self.device) * 2 - 1).to(self.vae.dtype).split(max(1, 4 * 1024**2 // images[0, 0].numel()))
        latents = torch.cat([self.vae.encode(chunk).latent_dist.mode() for chunk in chunks]).float()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def latent_size(self, height, width):
        """(h, w) of the latent of a height x width picture, in latent pixels. Raises ValueError for sizes that are no
        whole number of patches or have more of them than the model has positions."""
        patch = self.vae_scale * self.patch_size
        if height % patch or width % patch:
            raise ValueError(f"--resolution: {height} x {width} is not a multiple of {patch} pixels")
        if max(height, width) > patch * self.max_patches:
            raise ValueError(
                f"--resolution: {height} x {width} is above the {patch * self.max_patches} pixels that the model has "
                f"positions for"
            )
        return height // self.vae_scale, width // self.vae_scale

    def sigmas(self, num_steps, height, width):
        """num_steps + 1 noise levels from 1 to 0, float64.

        "stock" is the list of the stock pipeline, which applies SD3's shift twice (diffusers #13243); the published
        Flow-GRPO numbers for SD3.5 were made with it. "single" applies it once, as SD3 was trained:
        shift t / (1 + (shift - 1) t) for equally spaced t. A scheduler with dynamic shifting takes its shift from the
        resolution, in both schedules once; they differ in where the last step starts, at t = 0.001 or 1 / num_steps.
        """
        h, w = self.latent_size(height, width)
        config, mu = self.scheduler.config, None
        if config.get("use_dynamic_shifting"):
            base, top = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (top - base)
            mu = config.get("base_shift", 0.5) + slope * (h * w // self.patch_size**2 - base)
        scheduler = type(self.scheduler).from_config(config)
        if self.sigma_schedule == "single":
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        else:
            scheduler.set_timesteps(num_steps, mu=mu)
        return scheduler.sigmas.double()

    def init_noise(self, seeds, height, width):
        """Standard normal latents fp32 B C h w; row i is a function of seeds[i] (int64 [B]) alone."""
        return philox_normal(seeds.to(self.device), (self.latent_channels, *self.latent_size(height, width)))

    def velocity(self, x, sigma, cond, guidance=(1.0, 1.0)):
        """v = eps - x0 for x B C h w at noise level sigma fp32 [B]; same shape as x.

        guidance = (text, image); image guidance belongs to editing models. With text guidance g other than 1 it is
        v_null + g (v - v_null), both halves in one batch; gradient flows through both.
        """
        text_guidance = guidance[0]
        if text_guidance == 1:
            return self._forward(x, sigma, cond["text"], cond["pooled"])
        text, pooled = torch.cat([cond["text_null"], cond["text"]]), torch.cat([cond["pooled_null"], cond["pooled"]])
        v_null, v = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), text, pooled).float().chunk(2)
        return v_null + text_guidance * (v - v_null)

    def _forward(self, x, sigma, text, pooled):
        # Inputs are cast here and not by FSDP, which would round the timestep too.
        return self.parts["transformer"](
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            timestep=sigma * self.scheduler.config.num_train_timesteps,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, x):
        """Latents B C h w -> images float [0, 1] B 3 H W. At most 4 megapixels go through the decoder at once."""
        z = x / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return common.decode(self.vae, z, self.vae_scale)

    def save(self, folder, tensors):
        """Write the model in the ecosystem's format: pytorch_lora_weights.safetensors, or a whole diffusers folder.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        transformer = self.parts["transformer"]
        if not getattr(transformer, "peft_config", None):
            # The one thing in the file that is no parameter.
            tensors = tensors | {"transformer.pos_embed.pos_embed": transformer.pos_embed.pos_embed.cpu()}
        common.save(folder, self.pipeline_class, self.components, transformer, self.dtype, tensors)
