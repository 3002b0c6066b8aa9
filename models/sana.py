"""
SANA 1.0 and 1.5 (https://arxiv.org/abs/2410.10629, https://arxiv.org/abs/2501.18427) as a flow model, on diffusers' own
SanaTransformer2DModel and AutoencoderDC and transformers' Gemma-2. What we own is what an RL step touches: noise,
schedule, guidance, velocity.

Latents are B C h w, fp32, normalised, and reach the transformer as they are: the autoencoder's factor of 32 leaves
little to pack. Text is a row of Gemma's hidden states and the mask of its tokens; guidance is classifier-free against
the empty prompt. A picture has the size that is asked for; the stock pipeline's default is to draw one of its own
sizes and crop it (use_resolution_binning).
"""

import inspect

import torch

from kernels.sde_step import philox_normal
from models import pipeline as common
from models.cache import EmbeddingCache

# B samples, C h w latent, L text tokens, D Gemma's width

# Every projection of self- and cross-attention: what the published SANA recipe (cosmos-rl) trains, at rank 4.
LORA_TARGETS = [f"{attention}.to_{name}" for attention in ("attn1", "attn2") for name in ("q", "k", "v", "out.0")]


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
    instruction=True,
    train=True,
):
    """Load a SanaPipeline folder or hub id as a `Sana`.

    device, dtype: where and in what precision the model computes (torch.float32 or torch.bfloat16). lora_rank: 0 trains
    every parameter of the transformer, else a PEFT adapter of that rank (scale lora_alpha / lora_rank). with_reference:
    under full fine-tuning, keep a frozen copy of the transformer (with LoRA the adapter is switched off instead).
    offload_encoders: Gemma waits in CPU memory and visits the device only to encode (saves 5 GB). cache_prompts,
    cache_folder: see models/cache.py. instruction: write the stock pipeline's instruction to Gemma before every prompt,
    as its authors do; a tokenizer whose model_max_length does not hold it (the tiny models') goes without.
    train: False is a frozen model, all in dtype.

    Raises RuntimeError with one message for a gated, missing, unreachable or incomplete model, ValueError for a
    tokenizer without its vocabulary, for a distilled model (SANA-Sprint) and for a scheduler that is not of flow
    matching.
    """
    pipeline = common.load("SanaPipeline", source, dtype, train and lora_rank == 0)
    if pipeline.transformer.config.guidance_embeds:
        raise ValueError(
            f"'{source}' has guidance_embeds: SANA-Sprint is distilled to few steps of another schedule and is not "
            f"supported; use SANA 1.0 or 1.5"
        )
    training = (lora_rank, lora_alpha, with_reference)
    return Sana(pipeline, device, dtype, *training, offload_encoders, cache_prompts, cache_folder, instruction, train)


class Sana:
    """The flow-model contract. `parts` is what is trained, `blocks` what is sharded, checkpointed and compiled one by
    one."""

    reference_images = "none"
    embedded_guidance = False

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
        instruction=True,
        train=True,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self.pipeline_class, self.scheduler = type(pipeline), euler(pipeline.scheduler)
        # With the folder's own scheduler: an exported model samples in the stock pipeline as its base does.
        self.components = {name: part for name, part in pipeline.components.items() if name != "transformer"}
        self.tokenizer = pipeline.tokenizer
        self.tokenizer.padding_side = "right"  # GemmaTokenizer's own default is left
        self.encoder_device = torch.device("cpu") if offload_encoders else self.device
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(self.encoder_device)
        self.vae = pipeline.vae.requires_grad_(False).eval().to(self.device)
        self.vae_scale = 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)
        self.latent_channels = pipeline.transformer.config.in_channels
        self.text_tokens = min(300, self.tokenizer.model_max_length)
        self.instruction = stock_instruction(self.pipeline_class) if instruction else ""
        self.instruction_tokens = len(self.tokenizer.encode(self.instruction))
        if self.tokenizer.model_max_length < self.instruction_tokens + 2:
            self.instruction = ""
        self.cache = EmbeddingCache(self._encode_rows, cache_prompts, cache_folder)

        transformer = pipeline.transformer
        # diffusers gives SANA no choice of backends: self-attention is linear, and flash-attn takes no text mask.
        self.attention = "linear self-attention, torch scaled_dot_product_attention for text"
        self.reference_parts = common.make_trainable(
            transformer, dtype, lora_rank, lora_alpha, LORA_TARGETS, with_reference, train
        )
        self.parts = {"transformer": transformer}

    def blocks(self, part):
        """The repeated blocks of one part (a module out of `parts` or `reference_parts`)."""
        return [*part.transformer_blocks]

    @torch.no_grad()
    def encode(self, prompts, images=None, negative=None, seeds=None):
        """Prompt embeddings: dict of tensors with a row per prompt: text [B, L, D], mask int64 [B, L] (1 = token, 0 =
        padding), and the null rows text_null, mask_null that guidance needs (of `negative`, default the empty prompt;
        without the instruction, as in the stock pipeline). Raises ValueError if images are given."""
        if images is not None:
            raise ValueError("SANA is a text-to-image model and takes no images; choose an editing model with --model")
        # The cache goes by all that Gemma reads: the empty prompt is one thing with the instruction, another without.
        cond = self.cache([self.instruction + prompt.lower().strip() for prompt in prompts])
        null = self.cache([prompt.lower().strip() for prompt in negative or [""]])
        cond.update({f"{k}_null": rows.expand(len(prompts), *rows.shape[1:]) for k, rows in null.items()})
        return {name: rows.to(self.device) for name, rows in cond.items()}

    def condition(self, cond):
        """Trained conditioning; SANA has none."""
        return cond

    def _encode_rows(self, texts):
        # All texts of a call have the instruction, or none. Of one that has it the transformer sees <bos> and the last
        # text_tokens - 1 positions: the end of the instruction, the prompt, padding.
        instructed = self.instruction and texts[0].startswith(self.instruction)
        length = self.text_tokens + (self.instruction_tokens - 2 if instructed else 0)
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.device)
        self.text_encoder.to(self.device)
        text = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)[0]
        self.text_encoder.to(self.encoder_device)
        seen = [0, *range(length - self.text_tokens + 1, length)]
        return {"text": text[:, seen].to(self.dtype), "mask": tokens.attention_mask[:, seen]}

    @torch.no_grad()
    def encode_images(self, images):
        """Images float [0, 1] B 3 H W -> normalised latents fp32 B C h w (this autoencoder has no posterior and no
        shift). At most 4 megapixels go through the encoder at once."""
        chunks = (images.to(self.device) * 2 - 1).to(self.vae.dtype).split(max(1, 4 * 1024**2 // images[0, 0].numel()))
        latents = torch.cat([self.vae.encode(chunk).latent for chunk in chunks]).float()
        return latents * self.vae.config.scaling_factor

    def latent_size(self, height, width):
        """(h, w) of the latent of a height x width picture, in latent pixels. Raises ValueError for sizes SANA cannot
        patch."""
        multiple = self.vae_scale * self.parts["transformer"].config.patch_size
        if height % multiple or width % multiple:
            raise ValueError(f"--resolution: {height} x {width} is not a multiple of {multiple} pixels")
        return height // self.vae_scale, width // self.vae_scale

    def sigmas(self, num_steps, height, width):
        """num_steps + 1 noise levels from 1 to 0, float64: those of the stock pipeline with a flow-matching Euler
        scheduler of the model's shift (see `euler`), at every resolution the same.

        diffusers shifts the range at construction and what lies in it again, so the last level before 0 is small
        (0.009 at shift 3) and the last step all but nothing.
        """
        self.latent_size(height, width)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.double()

    def init_noise(self, seeds, height, width):
        """Standard normal latents fp32 B C h w; row i is a function of seeds[i] (int64 [B]) alone."""
        return philox_normal(seeds.to(self.device), (self.latent_channels, *self.latent_size(height, width)))

    def velocity(self, x, sigma, cond, guidance=(1.0, 1.0)):
        """v = eps - x0 for x B C h w at noise level sigma fp32 [B]; same shape as x.

        guidance = (text, image); image guidance belongs to editing models. Text guidance is v_null + g (v - v_null),
        both halves in one batch, and one forward where g = 1; gradient flows through both.
        """
        text_guidance = guidance[0]
        if text_guidance == 1:
            return self._forward(x, sigma, cond["text"], cond["mask"])
        text, mask = torch.cat([cond["text_null"], cond["text"]]), torch.cat([cond["mask_null"], cond["mask"]])
        v_null, v = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), text, mask).float().chunk(2)
        return v_null + text_guidance * (v - v_null)

    def _forward(self, x, sigma, text, mask):
        transformer = self.parts["transformer"]
        # Inputs are cast here and not by FSDP, which would round the timestep too.
        return transformer(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            encoder_attention_mask=mask,
            timestep=sigma * self.scheduler.config.num_train_timesteps * transformer.config.timestep_scale,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, x):
        """Latents B C h w -> images float [0, 1] B 3 H W. At most 4 megapixels go through the decoder at once."""
        return common.decode(self.vae, x / self.vae.config.scaling_factor, self.vae_scale)

    def save(self, folder, tensors):
        """Write the model in the ecosystem's format: pytorch_lora_weights.safetensors, or a whole diffusers folder.

        tensors: what is trained, full, by the names of parallel.trained (models.checkpoint.full_tensors); rank 0 only.
        """
        common.save(folder, self.pipeline_class, self.components, self.parts["transformer"], self.dtype, tensors)


def euler(scheduler):
    """The flow-matching Euler scheduler of a SANA folder: its own, or one with the same shift.

    SANA ships with DPMSolverMultistepScheduler, of second order: its step depends on the step before and is no Gaussian
    policy of the present state. The velocity is the same under both. Raises ValueError for a scheduler that is neither.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    config = scheduler.config
    if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas"):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is not of flow matching; expected FlowMatchEulerDiscreteScheduler, "
            f"or DPMSolverMultistepScheduler with use_flow_sigmas and prediction_type flow_prediction"
        )
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.flow_shift)


def stock_instruction(pipeline_class):
    """What the stock pipeline writes before a prompt by default, as one string."""
    return "\n".join(inspect.signature(pipeline_class.__call__).parameters["complex_human_instruction"].default)
