"""
FLUX.2 klein (https://github.com/black-forest-labs/flux2) as a flow model, on diffusers' own Flux2Transformer2DModel and
AutoencoderKLFlux2 and transformers' Qwen3. What we own is what an RL step touches: noise, schedule, token layout,
reference pictures, guidance, velocity.

Latents are B C h w, fp32, in the space the transformer sees: the autoencoder's latents, every 2 x 2 patch unshuffled
into channels (32 -> 128 channels, 16 pixels to a latent pixel) and whitened by the running statistics of its BatchNorm.
One latent pixel is one token. The base models have true classifier-free guidance against the empty prompt. One set of
weights does text to image and editing: the tokens of a reference picture follow those of the picture in the making.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kernels.sde_step import philox_normal
from models import pipeline as common
from models.cache import EmbeddingCache

# B samples, C h w latent, L text tokens, N = h * w image tokens, N' those of the reference picture

TEXT_LAYERS = (9, 18, 27)  # the hidden states of Qwen3 that FLUX.2 klein was trained on, side by side


def lora_targets(transformer):
    """Names of what an adapter trains: every attention projection of the double blocks; of the single blocks, in which
    attention and feed-forward are one matrix in and one out, these two. Embeddings, modulation and the double blocks'
    feed-forwards stay as they are."""
    # The single blocks' to_out is named in full: the double blocks have a container of that name.
    return [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        "attn.to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(len(transformer.single_transformer_blocks))),
    ]


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
    """Load a Flux2KleinPipeline folder or hub id as a `Flux2`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16).
    lora_rank: 0 trains every parameter of the transformer, else a PEFT adapter of that rank (scale lora_alpha /
    lora_rank). with_reference: under full fine-tuning, keep a frozen copy of the transformer (with LoRA the adapter is
    switched off instead). offload_encoders: the text encoder waits in CPU memory and visits the device only to encode
    (saves 8 GB for klein-base-4B). cache_prompts, cache_folder: see models/cache.py; a prompt is 8 MB here.
    train: False is a frozen model, all in dtype.

    Raises RuntimeError with one message for a gated, missing, unreachable or incomplete model, ValueError for a
    tokenizer without its vocabulary.
    """
    pipeline = common.load("Flux2KleinPipeline", source, dtype, train and lora_rank == 0)
    if dtype != torch.float32:
        # diffusers rounds buffers too; the statistics that scale every latent are kept as the file has them.
        vae = type(pipeline.vae).from_pretrained(pipeline.config._name_or_path, subfolder="vae")
        pipeline.vae.bn = vae.bn
    training = (lora_rank, lora_alpha, with_reference)
    return Flux2(pipeline, device, dtype, *training, offload_encoders, cache_prompts, cache_folder, train)


class Flux2:
    """The flow-model contract. `parts` is what is trained, `blocks` what is sharded, checkpointed and compiled one by
    one."""

    reference_images = "optional"

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
        self.distilled = self.components["is_distilled"] = pipeline.config.is_distilled
        self.tokenizer = pipeline.tokenizer
        self.encoder_device = torch.device("cpu") if offload_encoders else self.device
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(self.encoder_device)
        # channels_last: convolutions take half the time on a CPU.
        self.vae = pipeline.vae.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.vae_scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.transformer.config.in_channels
        self.text_tokens = min(512, self.tokenizer.model_max_length)
        self.cache = EmbeddingCache(self._encode_rows, cache_prompts, cache_folder)

        transformer = pipeline.transformer
        self.attention = common.use_best_attention(transformer, self.device, dtype)
        self.reference_parts = common.make_trainable(
            transformer, dtype, lora_rank, lora_alpha, lora_targets(transformer), with_reference, train
        )
        self.parts = {"transformer": transformer}

    def blocks(self, part):
        """The repeated blocks of one part (a module out of `parts` or `reference_parts`)."""
        return [*part.transformer_blocks, *part.single_transformer_blocks]

    @torch.no_grad()
    def encode(self, prompts, images=None, negative=None, seeds=None):
        """Conditioning: dict of tensors with a row per prompt: text [B, L, D], unless the model is distilled text_null
        (of `negative`, default the empty prompt), and with images (float [0, 1] B 3 H' W', of any size that latent_size
        accepts) image [B, C, h', w']: the latents of each prompt's own reference picture, fp32.

        The stock pipeline shows all images of a call to every prompt of it; here row i sees image i alone. It also
        shrinks references to 1 megapixel and crops them to whole tokens; the caller does so here. Raises ValueError
        where the numbers of images and prompts differ.
        """
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"expected an image for each of {len(prompts)} prompts, got {len(images)}")
        cond = self.cache(prompts)
        if not self.distilled:
            null = self.cache(negative or [""])["text"]
            cond["text_null"] = null.expand(len(prompts), *null.shape[1:])
        if images is not None:
            cond["image"] = self.encode_images(images)
        return {name: rows.to(self.device) for name, rows in cond.items()}

    def condition(self, cond):
        """Trained conditioning; FLUX.2 has none."""
        return cond

    def _encode_rows(self, prompts):
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.text_tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        self.text_encoder.to(self.device)
        # The model inside: the language-model head would make 150,000 logits a token for nothing.
        states = self.text_encoder.model(
            tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        self.text_encoder.to(self.encoder_device)
        return {"text": torch.cat([states[layer] for layer in TEXT_LAYERS], dim=-1).to(self.dtype)}

    def _whitening(self):
        bn = self.vae.bn
        std = (bn.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return bn.running_mean.float().view(-1, 1, 1), std.view(-1, 1, 1)

    @torch.no_grad()
    def encode_images(self, images):
        """Images float [0, 1] B 3 H W -> normalised latents fp32 B C h w (the mode of the posterior). At most 4
        megapixels go through the encoder at once. Raises ValueError for sizes FLUX.2 cannot patch."""
        self.latent_size(*images.shape[2:])
        chunks = (images.to(self.device) * 2 - 1).to(self.vae.dtype).split(max(1, 4 * 1024**2 // images[0, 0].numel()))
        latents = torch.cat([self.vae.encode(chunk).latent_dist.mode() for chunk in chunks]).float()
        mean, std = self._whitening()
        return (F.pixel_unshuffle(latents.contiguous(), 2) - mean) / std

    def latent_size(self, height, width):
        """(h, w) of the latent of a height x width picture, in latent pixels. Raises ValueError for sizes FLUX.2 cannot
        patch."""
        scale = 2 * self.vae_scale
        if height % scale or width % scale:
            raise ValueError(f"--resolution: {height} x {width} is not a multiple of {scale} pixels")
        return height // scale, width // scale

    def sigmas(self, num_steps, height, width):
        """The model's own schedule: num_steps + 1 noise levels from 1 to 0, float64, with FLUX.2's shift, which depends
        on resolution and number of steps (an empirical fit, from the stock pipeline)."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        h, w = self.latent_size(height, width)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        linear = np.linspace(1.0, 1 / num_steps, num_steps)
        if scheduler.config.get("use_flow_sigmas", False):  # a scheduler that makes them itself
            linear = None
        scheduler.set_timesteps(num_steps, sigmas=linear, mu=compute_empirical_mu(h * w, num_steps))
        return scheduler.sigmas.double()

    def init_noise(self, seeds, height, width):
        """Standard normal latents fp32 B C h w; row i is a function of seeds[i] (int64 [B]) alone."""
        return philox_normal(seeds.to(self.device), (self.latent_channels, *self.latent_size(height, width)))

    def velocity(self, x, sigma, cond, guidance=(1.0, 1.0)):
        """v = eps - x0 for x B C h w at noise level sigma fp32 [B]; same shape as x.

        guidance = (text, image): v_null + g (v - v_null) with the text's g, both halves in one batch, both with the
        reference picture if there is one; gradient flows through both. FLUX.2 has no image guidance. Raises ValueError
        for text guidance other than 1 on a distilled model.
        """
        g = guidance[0]
        if g == 1:
            return self._forward(x, sigma, cond["text"], cond.get("image"))
        if self.distilled:
            raise ValueError(f"--guidance {g}: this model is distilled to sample without guidance; use --guidance 1")
        text = torch.cat([cond["text_null"], cond["text"]])
        image = torch.cat([cond["image"], cond["image"]]) if "image" in cond else None
        v_null, v = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), text, image).float().chunk(2)
        return v_null + g * (v - v_null)

    def _forward(self, x, sigma, text, image):
        B, C, h, w = x.shape
        # Positions have four coordinates: picture (0 is the one in the making, 10 the reference), row, column, word.
        pictures = [(x, 0)] if image is None else [(x, 0), (image, 10)]
        tokens = torch.cat([latents.flatten(2).mT for latents, _ in pictures], dim=1)
        image_ids = torch.cat([_positions(t, *latents.shape[-2:], 1) for latents, t in pictures])
        # Inputs are cast here and not by FSDP, which would round sigma and the rotary tables on the way into every
        # block. A transformer with embedded guidance gets none, as in the stock pipeline.
        v = self.parts["transformer"](
            hidden_states=tokens.to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            timestep=sigma,
            img_ids=image_ids.to(x.device),
            txt_ids=_positions(0, 1, 1, text.shape[1]).to(x.device),
            guidance=None,
            return_dict=False,
        )[0]
        return v[:, : h * w].mT.reshape(B, C, h, w)

    @torch.no_grad()
    def decode(self, x):
        """Latents B C h w -> images float [0, 1] B 3 H W. At most 4 megapixels go through the decoder at once."""
        mean, std = self._whitening()
        return common.decode(self.vae, F.pixel_shuffle(x * std + mean, 2), self.vae_scale)

    def save(self, folder, tensors):
        """Write the model in the ecosystem's format: pytorch_lora_weights.safetensors, or a whole diffusers folder.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        common.save(folder, self.pipeline_class, self.components, self.parts["transformer"], self.dtype, tensors)


def _positions(t, h, w, words):
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(h), torch.arange(w), torch.arange(words))
