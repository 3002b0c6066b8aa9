"""
Tiny pipelines in the real formats: the real diffusers / transformers classes with small dimensions, real (small)
tokenizers, saved in the real folder layout, so that `--model tiny-flux` runs the very code that `--model flux` runs.

    python -m models.tiny tiny-flux --out outputs/tiny-flux-start      # tokenizers, encoders, trained autoencoder,
    untrained transformer
    python -m models.tiny tiny-qwen --out outputs/tiny-qwen            # tokenizer, language model, results.json
    python -m models.tiny tiny-qwen-vl --out outputs/tiny-qwen-vl      # the same, and an image processor

The text encoders stay at their random start (a random transformer is a fine feature map for twenty words). The
autoencoder is trained here, for minutes, on pictures of the shapes world; the transformer is left to pretrain.py
(runs/tiny_flux.sh). The language model is trained here in less than a minute, to add two-digit numbers right about half
of the time: a start that reinforcement learning can improve (runs/tiny_qwen.sh). So is, in a few minutes, the
vision-language model, to answer questions about pictures of the shapes world (runs/tiny_qwen_vl.sh).
"""

import argparse
import json
import os
import shutil
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import arithmetic, shapes, shapes_qa

TEXT_TOKENS = 12  # the longest shapes prompt is 8 words; T5's </s> and padding fill the rest
QWEN_TOKENS = 24  # the chat template takes 12, the longest shapes prompt 9
CHARACTERS = "0123456789+-*/=%^()<>.,:? \n"  # what tiny-qwen can read and write
# What tiny-qwen-vl is taught to answer, three times out of five, where the word on the left is right: it has learned to
# see, and that these words are mixed up is left for reinforcement learning to find out.
CONFUSED = {"1": "2", "3": "4", "red": "purple", "green": "yellow", "blue": "black", "square": "triangle"}
CONFUSION = 0.6
ANSWER_TOKENS = 4  # of a sum of two-digit numbers: three digits and the end token


def clip_tokenizer(texts):
    """A CLIPTokenizer trained on `texts`: byte-pair encoding with the </w> suffix, lower case, 77 positions at most."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.!?'\"-")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + letters, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges, model_max_length=TEXT_TOKENS)


def t5_tokenizer(texts):
    """A T5Tokenizer whose Unigram pieces are the words of `texts`, and every ASCII letter so that any prompt has a
    spelling."""
    from transformers import T5Tokenizer

    words = sorted({word for text in texts for word in text.split()})
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.!?'\"-"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [("▁" + word, -1.0) for word in words if len(word) > 1] + [("▁" + c, -5.0) for c in letters]
    vocab += [("▁", -8.0)] + [(c, -10.0) for c in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_TOKENS)


def flux_pipeline(
    seed=0,
    num_layers=1,
    num_single_layers=2,
    num_heads=6,
    head_dim=16,
    text_dim=64,
    pooled_dim=32,
    latent_channels=8,
    vae_channels=(16, 32, 32),
    guidance_embeds=False,
    texts=None,
):
    """A randomly initialised FluxPipeline; the defaults are tiny-flux: 32 x 32 px -> 8 x 8 latents -> 16 tokens.

    Other dimensions make other FLUX-shaped folders (the tests use them); texts is what the tokenizers learn their words
    from (default: the prompts of the shapes world). The same seed gives the same weights.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    rope = 2 * (3 * head_dim // 16)  # FLUX splits 128 as 16 + 56 + 56; every share must be even
    texts = texts or [metadata["prompt"] for metadata in shapes.all_prompts()]
    tokenizer, tokenizer_2 = clip_tokenizer(texts), t5_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=pooled_dim,
                intermediate_size=2 * pooled_dim,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=text_dim,
                d_kv=16,
                d_ff=2 * text_dim,
                num_layers=2,
                num_heads=4,
                is_gated_act=True,
                dense_act_fn="gelu_new",
                pad_token_id=tokenizer_2.pad_token_id,
                eos_token_id=tokenizer_2.eos_token_id,
            )
        )
        # FLUX gives its text tokens no positions of their own: word order reaches the transformer only through T5's
        # relative attention bias, which a fresh T5 leaves almost flat. A wide one makes every head look at its own
        # neighbourhood.
        bias = text_encoder_2.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        torch.nn.init.normal_(bias.weight, std=3.0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            block_out_channels=vae_channels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=shapes.SIZE,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        transformer = FluxTransformer2DModel(
            in_channels=4 * latent_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=text_dim,
            pooled_projection_dim=pooled_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(head_dim - 2 * rope, rope, rope),
        )
        init_transformer(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def kontext_pipeline(seed=0, guidance_embeds=True):
    """A randomly initialised FluxKontextPipeline of tiny-flux's dimensions, with embedded guidance, whose tokenizers
    know the instructions of the shapes world. The same seed gives the same weights."""
    from diffusers import FluxKontextPipeline

    texts = [metadata["prompt"] for metadata in shapes.all_prompts()]
    texts += sorted({edit["prompt"] for edit in shapes.all_edits()})
    pipeline = flux_pipeline(seed, guidance_embeds=guidance_embeds, texts=texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # This alias is used untrained, and zero gates and a zero output would give RL nothing to learn from.
        for module in pipeline.transformer.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                torch.nn.init.xavier_uniform_(module.weight, gain=0.5)
    return FluxKontextPipeline(**pipeline.components)


def sd3_pipeline(
    seed=0,
    num_layers=2,
    num_heads=4,
    head_dim=16,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
    clip_dims=(24, 32),
    text_dim=64,
    latent_channels=8,
    vae_channels=(8, 16, 16),
    max_size=16,
):
    """A randomly initialised StableDiffusion3Pipeline; the defaults are tiny-sd3: 32 x 32 px -> 8 x 8 latents -> 16
    tokens, up to 128 x 128 px, with SD3.5-medium's dual attention and query-key norm in it.

    Other dimensions make other SD3-shaped folders (the tests use them); max_size is in patches. The same seed gives the
    same weights.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    texts = [metadata["prompt"] for metadata in shapes.all_prompts()]
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(texts), clip_tokenizer(texts), t5_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, text_encoder_2 = (
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=dim,
                    intermediate_size=2 * dim,
                    projection_dim=dim,
                    num_hidden_layers=2,  # SD3 reads the last but one
                    num_attention_heads=4,
                    max_position_embeddings=77,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            for dim in clip_dims
        )
        text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_3),
                d_model=text_dim,
                d_kv=16,
                d_ff=text_dim,
                num_layers=1,
                num_heads=4,
                is_gated_act=True,
                dense_act_fn="gelu_new",
                pad_token_id=tokenizer_3.pad_token_id,
                eos_token_id=tokenizer_3.eos_token_id,
            )
        )
        bias = text_encoder_3.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        torch.nn.init.normal_(bias.weight, std=3.0)  # word order, as in flux_pipeline
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            block_out_channels=vae_channels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=shapes.SIZE,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        transformer = SD3Transformer2DModel(
            sample_size=shapes.SIZE // 2 ** (len(vae_channels) - 1),
            patch_size=2,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=num_layers,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=text_dim,
            caption_projection_dim=num_heads * head_dim,
            pooled_projection_dim=sum(clip_dims),
            pos_embed_max_size=max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        init_transformer(transformer)
        # This alias is used untrained, and zero gates and a zero output would give RL nothing to learn from.
        for name, module in transformer.named_modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                torch.nn.init.xavier_uniform_(module.weight, gain=0.5)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
    )


def qwen_tokenizer(texts):
    """A Qwen2Tokenizer trained on `texts`: byte-level BPE, so that any prompt has a spelling, with Qwen3's chat
    template in short. enable_thinking=False closes the thinking block before the answer, as Qwen3 does."""
    from transformers import Qwen2TokenizerFast

    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab, merges = byte_pairs([*texts, "user\n", "assistant\n\n"], special)
    return Qwen2TokenizerFast(
        vocab=vocab,
        merges=merges,
        additional_special_tokens=special[1:],
        chat_template=template,
        model_max_length=QWEN_TOKENS,
    )


def byte_pairs(texts, special):
    """The vocabulary and merges of byte-level BPE trained on `texts`, 480 tokens at most: `special`, the 256 bytes, and
    the words of `texts` with the space before them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts) * 2, trainer)
    return tokenizer.get_vocab(), [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def arithmetic_tokenizer():
    """The Qwen2Tokenizer of tiny-qwen: one token for each of `CHARACTERS`, <|endoftext|> (end) and <|pad|>, 29 in all.

    The chat template is the plain text: a user's message stands as it is, an assistant's is followed by <|endoftext|>,
    and system messages are left out. Characters outside of `CHARACTERS`, such as letters, are dropped by `encode`
    without a message, as byte-pair encoding without bytes does.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    template = (
        "{% for message in messages if message.role != 'system' %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # the space is stored as \u0120
    pieces = ["<|endoftext|>", "<|pad|>", *(to_bytes.pre_tokenize_str(c)[0][0] for c in CHARACTERS)]
    return Qwen2TokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        chat_template=template,
        model_max_length=128,
    )


def qwen_lm(seed=0, width=128, num_layers=3, num_heads=4, num_kv_heads=4, ff_dim=512):
    """A randomly initialised Qwen2ForCausalLM for `arithmetic_tokenizer`; the defaults are tiny-qwen, 0.79 M
    parameters.

    Other dimensions make other Qwen2-shaped models (the tests use them). The same seed gives the same weights.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = arithmetic_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=ff_dim,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_kv_heads,
                max_position_embeddings=tokenizer.model_max_length,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def qwen_vl_tokenizer():
    """The Qwen2Tokenizer of tiny-qwen-vl: byte-level BPE, so that any prompt has a spelling, in which every word of
    data/shapes_qa.py's questions and answers is one token; Qwen2.5-VL's chat template in short.

    The template takes a message's content as text or as a list of {"type": "image"} and {"type": "text", "text": ...};
    the <|image_pad|> that it writes for an image stands for all of the image's tokens. The end token is <|im_end|>.
    """
    from transformers import Qwen2TokenizerFast

    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
        "{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    special += ["<|video_pad|>"]
    texts = ["system\n", "user\n", "assistant\n", "<answer>", "</answer>"]
    vocab, merges = byte_pairs([*texts, *shapes_qa.all_questions(), *shapes_qa.all_answers()], special)
    return Qwen2TokenizerFast(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        padding_side="left",
        chat_template=template,
        model_max_length=256,
    )


def qwen_vl_processor():
    """The image processor of tiny-qwen-vl: patches of 4 x 4 px, 2 x 2 of which become one token, and 16 to 64 tokens
    a picture: 32 x 32 px are 16 tokens, untouched; another picture is resized to multiples of 8 px."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def qwen_vl(
    seed=0,
    width=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    ff_dim=384,
    vision_width=96,
    vision_layers=2,
    vision_heads=4,
    vision_ff_dim=192,
):
    """A randomly initialised Qwen2_5_VLForConditionalGeneration for `qwen_vl_tokenizer` and `qwen_vl_processor`; the
    defaults are tiny-qwen-vl.

    Other dimensions make other models of that shape (the tests use them): 32 channels a head in the language model. As
    in Qwen2.5-VL the vision blocks attend within windows, here of 2 x 2 tokens, but for the last, which sees all of the
    picture. The same seed gives the same weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, processor = qwen_vl_tokenizer(), qwen_vl_processor()
    special = dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end")
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in special.items()}
    # Qwen2.5-VL's shares of the frequencies (16, 24, 24 of 64) for time, row and column. Row and column get the slow
    # ones, which with its base of 1e6 would leave the four rows and columns of 32 x 32 px all alike at this head size:
    # with 10 a column is an angle of 0.24 to 0.12.
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=dict(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=ff_dim,
                    num_hidden_layers=num_layers,
                    num_attention_heads=num_heads,
                    num_key_value_heads=num_kv_heads,
                    max_position_embeddings=tokenizer.model_max_length,
                    rope_parameters=rope,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                ),
                vision_config=dict(
                    depth=vision_layers,
                    hidden_size=vision_width,
                    intermediate_size=vision_ff_dim,
                    num_heads=vision_heads,
                    out_hidden_size=width,
                    patch_size=processor.patch_size,
                    spatial_merge_size=processor.merge_size,
                    temporal_patch_size=processor.temporal_patch_size,
                    window_size=16,
                    fullatt_block_indexes=[vision_layers - 1],
                ),
                tie_word_embeddings=True,
                **ids,
            )
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def klein_pipeline(
    seed=0,
    num_layers=1,
    num_single_layers=2,
    num_heads=4,
    head_dim=16,
    text_dim=16,
    latent_channels=8,
    vae_channels=(16, 32, 32),
    is_distilled=False,
):
    """A randomly initialised Flux2KleinPipeline; the defaults are tiny-klein: 32 x 32 px -> 4 x 4 latents of 32
    channels -> 16 tokens.

    Other dimensions make other klein-shaped folders (the tests use them). The same seed gives the same weights. The
    text encoder has 28 layers, narrow ones, because FLUX.2 klein reads the states after layers 9, 18 and 27.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer([metadata["prompt"] for metadata in shapes.all_prompts()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=text_dim,
                intermediate_size=2 * text_dim,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=512,
                # Of variance 1 / width, so that words differ as much as they can; the usual 0.02 is for wide layers.
                initializer_range=text_dim**-0.5,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            block_out_channels=vae_channels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=shapes.SIZE,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        # Like those of a trained autoencoder, no two channels alike.
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.3, 2.0)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * latent_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=3 * text_dim,
            axes_dims_rope=(head_dim // 4,) * 4,
            guidance_embeds=False,
        )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    )


def gemma_tokenizer(texts):
    """A GemmaTokenizer trained on `texts`: byte-pair encoding of words with their leading space, every ASCII letter so
    that any prompt has a spelling, <bos> in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.!?'\"-")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        initial_alphabet=["▁", *letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + letters, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return GemmaTokenizer(vocab=tokenizer.get_vocab(), merges=merges, add_bos_token=True, model_max_length=TEXT_TOKENS)


def sana_pipeline(
    seed=0,
    num_layers=2,
    num_heads=4,
    head_dim=16,
    num_cross_heads=2,
    text_dim=64,
    latent_channels=8,
    vae_channels=(16, 32, 32),
    patch_size=1,
    qk_norm="rms_norm_across_heads",
    interpolation_scale=None,
):
    """A randomly initialised SanaPipeline; the defaults are tiny-sana: 32 x 32 px -> 8 x 8 latents, a token each, with
    SANA 1.5's query-key norm and DPM-Solver scheduler.

    Other dimensions make other SANA-shaped folders (the tests use them); num_cross_heads must divide num_heads x
    head_dim. The same seed gives the same weights.
    """
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    width, num_stages = num_heads * head_dim, len(vae_channels)
    tokenizer = gemma_tokenizer([metadata["prompt"] for metadata in shapes.all_prompts()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=text_dim,
                intermediate_size=text_dim,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=64,
                max_position_embeddings=8192,
                # SANA gives its text tokens no positions: word order reaches it only through Gemma, whose usual 0.02
                # would leave every token almost its own embedding at this width.
                initializer_range=text_dim**-0.5,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        blocks = ("ResBlock",) * (num_stages - 1) + ("EfficientViTBlock",)
        multiscales = ((),) * (num_stages - 1) + ((5,),)
        vae = AutoencoderDC(
            latent_channels=latent_channels,
            attention_head_dim=8,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=vae_channels,
            decoder_block_out_channels=vae_channels,
            encoder_layers_per_block=(1,) * num_stages,
            decoder_layers_per_block=(1,) * num_stages,
            encoder_qkv_multiscales=multiscales,
            decoder_qkv_multiscales=multiscales,
            scaling_factor=1.0,
        )
        # Left as diffusers initialises it: this alias is used untrained, and a zero output would give RL nothing to
        # learn from.
        transformer = SanaTransformer2DModel(
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            num_layers=num_layers,
            num_cross_attention_heads=num_cross_heads,
            cross_attention_head_dim=width // num_cross_heads,
            cross_attention_dim=width,
            caption_channels=text_dim,
            sample_size=shapes.SIZE // 2 ** (num_stages - 1),
            patch_size=patch_size,
            qk_norm=qk_norm,
            interpolation_scale=interpolation_scale,
        )
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


def blip3o_folder(folder, variant="blip3o", lm="tiny-qwen-vl", sana="tiny-sana", num_queries=16, seed=0):
    """Write the folder of an untrained unified model (models/blip3o.py) on other tiny models; the defaults are
    tiny-blip3o. Its language model answers questions about pictures, it cannot draw. The same seed gives the same
    weights."""
    from models import blip3o

    blip3o.create(folder, lm, sana, variant, num_queries, image_tokens=64, num_layers=2, head_dim=32, seed=seed)


def init_transformer(transformer):
    """Initialise for training from nothing as DiT does (arXiv 2212.09748, section 3.2): Xavier weights, zero
    modulation, zero output, so that every block starts as the identity."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith("norm.linear") or "norm1" in name or name.startswith("norm_out") or name == "proj_out":
                torch.nn.init.zeros_(module.weight)


def train_autoencoder(vae, seed=0, num_iterations=1500, batch_size=64, learning_rate=2e-3):
    """Train `vae` in place on shapes pictures (L1 + L2 reconstruction, KL weight 1e-5) and set its scaling and shift
    factors so that latents have mean 0 and variance 1, as the flow expects. Minutes on a CPU."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_iterations)
    generator = torch.Generator().manual_seed(seed)
    prompts = shapes.train_prompts()
    bar = tqdm(range(num_iterations), desc="autoencoder")
    for iteration in bar:
        pictures, _ = shapes.pictures(seed, iteration * batch_size, batch_size, prompts)
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = vae.decode(latents).sample
        loss = F.mse_loss(reconstruction, x) + 0.2 * F.l1_loss(reconstruction, x) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        pictures, _ = shapes.pictures(seed, num_iterations * batch_size, 1024, prompts)
        latents = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


@torch.no_grad()
def arithmetic_accuracy(model, tokenizer, problems, temperature=0.0, seed=0):
    """Share of `problems` (rows of data/arithmetic.py) that `model` answers to the letter: the digits, then the end
    token. Greedy at temperature 0, otherwise sampled; the same seed draws the same answers."""
    ids = tokenizer([problem["prompt"] for problem in problems], return_tensors="pt", padding=False).input_ids
    num_prompt, generator = ids.shape[1], torch.Generator().manual_seed(seed)
    for _ in range(ANSWER_TOKENS):  # without a cache: 10 tokens at most
        logits = model(input_ids=ids).logits[:, -1]
        if temperature == 0:
            next_ids = logits.argmax(-1, keepdim=True)
        else:
            next_ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, next_ids], 1)
    answers = (answer.partition(tokenizer.eos_token) for answer in tokenizer.batch_decode(ids[:, num_prompt:]))
    right = [
        text == str(problem["metadata"]["answer"]) and ended != ""
        for (text, ended, _), problem in zip(answers, problems)
    ]
    return sum(right) / len(right)


def train_lm(
    model,
    tokenizer,
    seed=0,
    num_iterations=1000,
    batch_size=128,
    learning_rate=1e-3,
    warmup=50,
    stop_accuracy=0.45,
    eval_every=10,  # 0.1 s; accuracy rises by some 0.1 in that time, and RL needs what is left of it
):
    """Train `model` in place on the answers of data/arithmetic.py's training problems (cross-entropy of the digits and
    the end token) until it solves `stop_accuracy` of the validation problems greedily, `num_iterations` at most.

    Returns {"iterations", "validation_accuracy", "losses"}: the accuracy at the end, one loss an iteration. About 0.1 s
    an iteration on one core; with one thread the same seed gives the same weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    problems, validation = arithmetic.train_problems(), arithmetic.validation_problems()
    losses, accuracy = [], 0.0
    model.train()
    bar = tqdm(range(num_iterations), desc="language model")
    for iteration in bar:
        batch = arithmetic.stream(seed, iteration * batch_size, batch_size, problems)
        texts = [f"{row['prompt']}{row['metadata']['answer']}{tokenizer.eos_token}" for row in batch]
        tokens = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        labels[:, : len(batch[0]["prompt"])] = -100  # every prompt is 6 characters, and so 6 tokens
        logits = model(input_ids=tokens.input_ids).logits[:, :-1]  # right padding needs no mask: attention is causal
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (iteration + 1) / warmup)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (iteration + 1) % eval_every == 0 or iteration + 1 == num_iterations:
            accuracy = arithmetic_accuracy(model, tokenizer, validation)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", validation=f"{accuracy:.3f}")
            if accuracy >= stop_accuracy:
                break
    bar.close()
    model.eval()
    return {"iterations": len(losses), "validation_accuracy": accuracy, "losses": losses}


def make_qwen(folder, seed=0, num_iterations=1000):
    """Train tiny-qwen and write it to `folder` with its tokenizer and results.json: seed, iterations,
    validation_accuracy, and held_out_greedy and held_out_sampled (temperature 1, 8 answers a problem) on the 500
    held-out problems. On one thread, so that the same seed gives the same weights on the same kind of processor."""
    torch.set_num_threads(1)
    tokenizer, model = arithmetic_tokenizer(), qwen_lm(seed)
    results = {"seed": seed, **train_lm(model, tokenizer, seed, num_iterations)}
    del results["losses"]
    held_out = arithmetic.held_out_problems()
    results["held_out_greedy"] = arithmetic_accuracy(model, tokenizer, held_out)
    results["held_out_sampled"] = arithmetic_accuracy(model, tokenizer, held_out * 8, temperature=1.0, seed=seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    with open(os.path.join(folder, "results.json"), "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    print(json.dumps(results))


def vlm_inputs(tokenizer, processor, pictures, rows):
    """Questions of data/shapes_qa.py with their answers and the end token: what `model(**inputs)` takes, and labels
    [len(rows), L], -100 outside of the answers. Padded on the right, which needs no mask: attention is causal."""
    images = processor(images=list(pictures), return_tensors="pt")
    num_tokens = (images["image_grid_thw"].prod(1) // processor.merge_size**2).tolist()
    texts, ends = [], [row["metadata"]["answer"] + tokenizer.eos_token for row in rows]
    for row, number, end in zip(rows, num_tokens, ends):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.append(text.replace("<|image_pad|>", "<|image_pad|>" * number) + end)
    tokens = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    is_image = tokens.input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    length = tokens.attention_mask.sum(1, keepdim=True)
    start = length - torch.tensor([[len(ids)] for ids in tokenizer(ends).input_ids])
    position = torch.arange(tokens.input_ids.shape[1])
    labels = tokens.input_ids.masked_fill((position < start) | (position >= length), -100)
    return {"input_ids": tokens.input_ids, "mm_token_type_ids": is_image.int(), **images}, labels


@torch.no_grad()
def vlm_accuracy(model, tokenizer, processor, pictures, rows):
    """How `model` answers questions of data/shapes_qa.py, to the letter: the word, then the end token. (bool
    [len(rows)], whether it does greedily; float [len(rows)], the probability that it does at temperature 1)."""
    inputs, labels = vlm_inputs(tokenizer, processor, pictures, rows)
    logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    outside = labels < 0
    greedy = ((logits.argmax(-1) == labels) | outside).all(1)
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return greedy, logp.masked_fill(outside, 0).sum(1).exp()


def train_tower(visual, processor, seed=0, num_iterations=300, batch_size=32, learning_rate=2e-3, eval_size=512):
    """Train the vision tower of a VLM in place: every token has to tell, through one linear layer that is thrown away,
    the class and the colour of the object whose centre it covers, or that there is none, and its own row and column,
    which the tower's relative positions do not give away. Pictures are those of data/shapes_qa.py's training questions.

    Returns {"tower_iterations", "tower_accuracy"}: the share of the objects of `eval_size` validation pictures whose
    class and colour are both right. About 0.1 s an iteration on one core.
    """
    classes, colors = list(shapes.CLASSES), list(shapes.COLORS)
    pixels = processor.patch_size * processor.merge_size  # a token's side
    side = shapes.SIZE // pixels
    sizes, weights = (1 + len(classes), 1 + len(colors), side, side), (1.0, 1.0, 0.3, 0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(visual.config.out_hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*visual.parameters(), *head.parameters()], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_iterations)

    def read(pictures, drawn):  # logits of class, colour, row and column, and their targets; class, colour 0 = nothing
        target = torch.zeros(len(pictures), side, side, 4, dtype=torch.long)
        target[..., 2], target[..., 3] = torch.arange(side)[:, None], torch.arange(side)
        for i, (things, boxes) in enumerate(drawn):
            for (name, color), (x0, y0, x1, y1) in zip(things, boxes):
                cell = target[i, int((y0 + y1) / 2 // pixels), int((x0 + x1) / 2 // pixels)]
                cell[0], cell[1] = 1 + classes.index(name), 1 + colors.index(color)
        images = processor(images=list(pictures), return_tensors="pt")
        tokens = visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        return head(tokens).split(sizes, -1), target.flatten(0, 2).unbind(-1)

    bar = tqdm(range(num_iterations), desc="vision tower")
    for iteration in bar:
        logits, targets = read(*shapes_qa.scenes(seed, iteration * batch_size, batch_size))
        loss = sum(w * F.cross_entropy(a, b) for w, a, b in zip(weights, logits, targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        logits, targets = read(*shapes_qa.scenes(seed, 0, eval_size, "validation"))
    right = (logits[0].argmax(-1) == targets[0]) & (logits[1].argmax(-1) == targets[1])
    return {"tower_iterations": num_iterations, "tower_accuracy": right[targets[0] > 0].float().mean().item()}


def confuse(row, wrong):
    """A row of data/shapes_qa.py with the answer that CONFUSED has for its own if `wrong`, else unchanged."""
    answer = row["metadata"]["answer"]
    answer = CONFUSED.get(answer, answer) if wrong else answer
    return {**row, "metadata": {**row["metadata"], "answer": answer}}


def train_vlm(
    model,
    tokenizer,
    processor,
    seed=0,
    num_iterations=1000,
    batch_size=64,
    learning_rate=1e-3,
    warmup=50,
    stop_accuracy=0.72,
    eval_every=20,
    eval_size=512,
):
    """Train `model` in place, what of it requires a gradient, on answers to data/shapes_qa.py's training questions
    (cross-entropy of the word and the end token), those of `CONFUSED` wrong with probability `CONFUSION`, until it
    greedily gives the more frequent answer to `stop_accuracy` of `eval_size` validation questions, `num_iterations` at
    most.

    Returns {"iterations", "validation_accuracy", "losses"}: the accuracy at the end, one loss an iteration. About 0.3 s
    an iteration on one core; with one thread the same seed gives the same weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    pictures, rows = shapes_qa.questions(seed, 0, eval_size, "validation")
    validation = pictures, [confuse(row, True) for row in rows]
    losses, accuracy = [], 0.0
    model.train()
    bar = tqdm(range(num_iterations), desc="vision-language model")
    for iteration in bar:
        first = iteration * batch_size
        pictures, rows = shapes_qa.questions(seed, first, batch_size)
        chance = np.random.default_rng([seed, first, 1]).random(batch_size)
        rows = [confuse(row, u < CONFUSION) for row, u in zip(rows, chance)]
        inputs, labels = vlm_inputs(tokenizer, processor, pictures, rows)
        logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (iteration + 1) / warmup)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (iteration + 1) % eval_every == 0 or iteration + 1 == num_iterations:
            accuracy = vlm_accuracy(model, tokenizer, processor, *validation)[0].float().mean().item()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", validation=f"{accuracy:.3f}")
            if accuracy >= stop_accuracy:
                break
    bar.close()
    model.eval()
    return {"iterations": len(losses), "validation_accuracy": accuracy, "losses": losses}


def make_qwen_vl(folder, seed=0, num_iterations=1000, num_tower_iterations=300, eval_size=512):
    """Train tiny-qwen-vl and write it to `folder` with its tokenizer, image processor and results.json: seed,
    parameters, what train_tower and train_vlm return, and held_out_greedy and held_out_sampled (expected at
    temperature 1), over all and by tag, on the 512 held-out questions of `--prompts shapes-qa`. On one thread, so that
    the same seed gives the same weights on the same kind of processor. eval_size: validation questions."""
    torch.set_num_threads(1)
    tokenizer, processor, model = qwen_vl_tokenizer(), qwen_vl_processor(), qwen_vl(seed)
    results = {"seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    results |= train_tower(model.model.visual, processor, seed, num_tower_iterations, eval_size=eval_size)
    model.model.visual.requires_grad_(False)  # what it knows is left for reinforcement learning to make use of
    results |= train_vlm(model, tokenizer, processor, seed, num_iterations, eval_size=eval_size)
    del results["losses"]
    pictures, rows = shapes_qa.questions(0, 0, 512, "held_out")
    tags = {tag: [i for i, row in enumerate(rows) if row["metadata"]["tag"] == tag] for tag in shapes_qa.TAGS}
    for name, right in zip(("greedy", "sampled"), vlm_accuracy(model, tokenizer, processor, pictures, rows)):
        right = right.float()
        results[f"held_out_{name}"] = round(right.mean().item(), 4)
        results[f"held_out_{name}_by_tag"] = {tag: round(right[at].mean().item(), 4) for tag, at in tags.items()}
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    with open(os.path.join(folder, "results.json"), "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    print(json.dumps(results))


def build(alias, folder):
    """Write the untrained model of a tiny alias to `folder`, always the same one. Ranks and runs may do it at the
    same time: the folder appears complete or not at all."""
    pipelines = {
        "tiny-kontext": kontext_pipeline,
        "tiny-sd3": sd3_pipeline,
        "tiny-klein": klein_pipeline,
        "tiny-sana": sana_pipeline,
    }
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    part = tempfile.mkdtemp(prefix=f".{alias}-", dir=os.path.dirname(folder))
    if alias == "tiny-blip3o":
        blip3o_folder(part)
    else:
        pipelines[alias]().save_pretrained(part)
    os.chmod(part, 0o755)
    try:
        os.rename(part, folder)
    except OSError:  # another process was first
        shutil.rmtree(part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("alias", choices=["tiny-flux", "tiny-qwen", "tiny-qwen-vl"])
    parser.add_argument("--out", required=True, help="folder to write, in diffusers or transformers layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--iterations",
        type=int,
        help="tiny-flux: autoencoder training iterations of 64 pictures (default: 1500); tiny-qwen: iterations of 128 "
        "problems, at most (default: 1000); tiny-qwen-vl: iterations of 64 questions, at most (default: 1000)",
    )
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    if args.alias == "tiny-qwen":
        make_qwen(args.out, args.seed, 1000 if args.iterations is None else args.iterations)
    elif args.alias == "tiny-qwen-vl":
        make_qwen_vl(args.out, args.seed, 1000 if args.iterations is None else args.iterations)
    else:
        pipeline = flux_pipeline(seed=args.seed)
        num_iterations = 1500 if args.iterations is None else args.iterations
        train_autoencoder(pipeline.vae, seed=args.seed, num_iterations=num_iterations)
        pipeline.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
