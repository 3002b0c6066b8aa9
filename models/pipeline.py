"""
What the models made of a diffusers pipeline do alike: open it, make its transformer trainable, decode, export. What
differs between architectures (conditioning, packing, schedule, guidance) is in their own files.
"""

import copy
import importlib.util
import json
import os

import torch

import models

# Of a file of an exported model (GB of 10^9 bytes), of whichever library; the default of diffusers is 10GB, that of
# transformers 50GB.
MAX_SHARD_SIZE = "5GB"


def load(pipeline_class, source, dtype, masters):
    """The pipeline of a local folder or hub id, in dtype; with `masters` its transformer, to be trained whole, in fp32.

    pipeline_class: the name of a diffusers pipeline class. Raises RuntimeError with one message for a gated, missing,
    unreachable or incomplete model, ValueError for a tokenizer without its vocabulary.
    """
    from transformers.utils import logging

    # diffusers imports image processors whose default wants torchvision and says so; nothing here uses them.
    logging.set_verbosity_error()
    import diffusers

    cls = getattr(diffusers, pipeline_class)
    folder = source if os.path.isdir(source) else models.hub(source, lambda: cls.download(source))
    try:
        with open(os.path.join(folder, "model_index.json")) as f:
            # SD3 without T5: diffusers writes such a folder, and reads it only if told what is not there.
            absent = {name: None for name, value in json.load(f).items() if value == [None, None]}
        pipeline = cls.from_pretrained(folder, dtype=dtype, **absent)
        if masters and dtype != torch.float32:
            # Taken from the file itself, not from its rounded copy.
            pipeline.transformer = type(pipeline.transformer).from_pretrained(folder, subfolder="transformer")
    except OSError as error:
        raise RuntimeError(f"'{source}' is incomplete, download or save it again: {error}") from None
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
            if encoder is None:
                continue
            vocabulary = encoder.get_input_embeddings().num_embeddings
            # transformers makes a tokenizer of only special tokens where the files are missing, and says nothing.
            if len(tokenizer) < vocabulary / 2:
                raise ValueError(
                    f"'{source}': {name} has {len(tokenizer)} tokens for an encoder of {vocabulary}; "
                    f"its files are missing or belong to another model"
                )
    return pipeline


def make_trainable(transformer, dtype, lora_rank, lora_alpha, lora_targets, with_reference, train):
    """Prepare `transformer` in place: with lora_rank an adapter is trained, else every parameter; without `train`
    nothing is.

    Returns the model's `reference_parts`: None, or under full fine-tuning and with_reference a frozen copy in dtype.
    """
    if not train:
        transformer.requires_grad_(False)
        return None
    if lora_rank > 0:
        add_lora(transformer, lora_rank, lora_alpha, lora_targets)
        return None
    transformer.requires_grad_(True)
    return {"transformer": copy.deepcopy(transformer).to(dtype).requires_grad_(False)} if with_reference else None


def add_lora(transformer, rank, alpha, targets):
    """Add a PEFT adapter (fp32 weights, gaussian A, zero B, so that the start is the base model) to the layers whose
    names end in one of `targets`, and freeze everything else."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every rank must make the same adapter before it is sharded
        transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def use_best_attention(transformer, device, dtype):
    """flash-attn where it is installed and applies (CUDA, 16 bit), else PyTorch's own; returns the name of what is in
    use."""
    if device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
        transformer.set_attention_backend("flash")
        return "flash-attn"
    return "torch scaled_dot_product_attention"


def token_ids(tokenizer, prompts, length):
    """int64 [len(prompts), length], padded and cut to length."""
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def decode(vae, z, vae_scale):
    """Unnormalised latents B C h w -> images float [0, 1] B 3 H W. At most 4 megapixels go through the decoder at
    once."""
    pixels = z.shape[-1] * z.shape[-2] * vae_scale**2
    images = [vae.decode(chunk, return_dict=False)[0] for chunk in z.to(vae.dtype).split(max(1, 4 * 1024**2 // pixels))]
    return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)


def save(folder, pipeline_class, components, transformer, dtype, tensors):
    """Write pytorch_lora_weights.safetensors where `transformer` has an adapter, else a whole diffusers folder, in
    files of MAX_SHARD_SIZE at most.

    components: everything of the pipeline but the transformer, by name. tensors: what is trained, full, by the names of
    parallel.trained (models.checkpoint.full_tensors); rank 0 only.
    """
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if getattr(transformer, "peft_config", None):
        config = transformer.peft_config["default"]
        layers = {name.replace(".default.", "."): tensor for name, tensor in state.items()}
        # Without the metadata the stock loader takes alpha = rank, and the picture is another one.
        pipeline_class.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
        )
        return
    with torch.device("meta"):
        whole = type(transformer).from_config(dict(transformer.config))
    whole.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    pipeline_class(**components, transformer=whole).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
