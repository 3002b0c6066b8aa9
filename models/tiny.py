"""
Tiny pipelines in the real formats: the real diffusers / transformers classes with small dimensions, real (small)
tokenizers, saved in the real folder layout, so that `--model tiny-flux` runs the very code that `--model flux` runs.

    python -m models.tiny tiny-flux --out outputs/tiny-flux-start      # tokenizers, encoders, trained autoencoder,
    untrained transformer
    python -m models.tiny tiny-qwen --out outputs/tiny-qwen            # tokenizer, language model, results.json
    python -m models.tiny tiny-qwen-vl --out outputs/tiny-qwen-vl      # the same, and an image processor
    python -m models.tiny tiny-qwen-refine --out outputs/tiny-qwen-refine  # tokenizer, language model, results.json
    python -m models.tiny tiny-blip3o-lm --out outputs/tiny-blip3o-lm  # the same: the language model of tiny-blip3o

The text encoders stay at their random start (a random transformer is a fine feature map for twenty words). The
autoencoder is trained here, for minutes, on pictures of the shapes world; the transformer is left to pretrain.py
(runs/tiny_flux.sh). The language model is trained here in less than a minute, to add two-digit numbers right about half
of the time: a start that reinforcement learning can improve (runs/tiny_qwen.sh). So is, in a few minutes, the
vision-language model, to answer questions about pictures of the shapes world (runs/tiny_qwen_vl.sh), and in two minutes
the one that refines prompts, to say what a user asks for in the words of captions, of which it takes some for others
(runs/tiny_qwen_refine.sh). The language model of tiny-blip3o learns in a quarter of an hour what a frozen one has to
know for a picture to be drawn from what it says: to see, and to understand captions, instructions and what users say
for them.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import arithmetic, phrases, shapes, shapes_qa
from kernels.sde_step import fold_seed

TEXT_TOKENS = 12  # the longest shapes prompt is 8 words; T5's </s> and padding fill the rest
QWEN_TOKENS = 24  # the chat template takes 12, the longest shapes prompt 9
CHARACTERS = "0123456789+-*/=%^()<>.,:? \n"  # what tiny-qwen can read and write
# What tiny-qwen-vl is taught to answer, three times out of five, where the word on the left is right: it has learned to
# see, and that these words are mixed up is left for reinforcement learning to find out.
CONFUSED = {"1": "2", "3": "4", "red": "purple", "green": "yellow", "blue": "black", "square": "triangle"}
CONFUSION = 0.6
# What the language model of tiny-blip3o learns, and its share of the training rows.
LM_TASKS = {"question": 0.5, "caption": 0.15, "edit": 0.15, "describe": 0.1, "text_question": 0.1}
# Words of users that tiny-qwen-refine is taught to take for another of their kind, three times out of five: 24 of the
# 39 of data/phrases.py, so many that it shows in what tiny-flux draws. What a word is mistaken for is never right for
# another one of these: in a model this small, learning the one would unlearn the other.
MISUNDERSTOOD = {
    "disc": "square",
    "ball": "square",
    "ring": "square",
    "wedge": "square",
    "pyramid": "square",
    "cone": "square",
    "crimson": "purple",
    "scarlet": "yellow",
    "ruby": "purple",
    "jade": "yellow",
    "mint": "purple",
    "lime": "yellow",
    "navy": "purple",
    "cobalt": "yellow",
    "sapphire": "purple",
    "charcoal": "yellow",
    "jet": "purple",
    "raven": "yellow",
    "on the left side of": "right of",
    "to the left of": "right of",
    "west of": "right of",
    "over": "below",
    "on top of": "below",
    "north of": "below",
}
REFINE_TOKENS = 16  # the longest caption is 8 words, with the tags and the end token 11
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


def byte_pairs(texts, special, limit=480):
    """The vocabulary and merges of byte-level BPE trained on `texts`, `limit` tokens at most: `special`, the 256 bytes,
    and the words of `texts` with the space before them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=limit,
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


def qwen_vl_tokenizer(texts=(), limit=480):
    """The Qwen2Tokenizer of tiny-qwen-vl: byte-level BPE, so that any prompt has a spelling, in which every word of
    data/shapes_qa.py's questions and answers, and of `texts`, is one token, if `limit` tokens suffice for that;
    Qwen2.5-VL's chat template in short.

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
    texts = ["system\n", "user\n", "assistant\n", "<answer>", "</answer>", *texts]
    vocab, merges = byte_pairs([*texts, *shapes_qa.all_questions(), *shapes_qa.all_answers()], special, limit)
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


def blip3o_tokenizer():
    """The tokenizer of tiny-blip3o's language model: that of tiny-qwen-vl, with one token for every word, with or
    without a space before it, of captions, edit instructions, what users say for captions (data/phrases.py) and the
    prompts of models/blip3o.py."""
    from models import blip3o

    texts = [blip3o.T2I.format(""), blip3o.EDIT.format(""), blip3o.REFINE.format(""), blip3o.DESCRIBE]
    # Moves are left out, here and where it is trained: an instruction that it spells, and has never seen.
    edits = [edit for edit in shapes.all_edits() if edit["tag"] != "move"]
    words = {word for m in [*shapes.all_prompts(), *edits] for word in m["prompt"].split()}
    words = sorted(words | set(phrases.all_words()))
    return qwen_vl_tokenizer([*texts, *words, *(f" {word}" for word in words)], limit=2000)


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
    tokenizer=None,
):
    """A randomly initialised Qwen2_5_VLForConditionalGeneration for `qwen_vl_processor` and a tokenizer (default: that
    of tiny-qwen-vl); the defaults are tiny-qwen-vl.

    Other dimensions make other models of that shape (the tests use them): 32 channels a head in the language model. As
    in Qwen2.5-VL the vision blocks attend within windows, here of 2 x 2 tokens, but for the last, which sees all of the
    picture. The same seed gives the same weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, processor = tokenizer or qwen_vl_tokenizer(), qwen_vl_processor()
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


def blip3o_lm(seed=0):
    """The language model of tiny-blip3o, untrained. The same seed gives the same weights."""
    model = qwen_vl(seed, tokenizer=blip3o_tokenizer())
    with torch.no_grad():
        # Words that occur in the same places, as the classes do, are pushed in the same direction first, which from
        # Qwen2.5-VL's 0.02 leaves them too much alike for long.
        model.get_input_embeddings().weight *= 3
    return model


def refine_tokenizer():
    """The Qwen2Tokenizer of tiny-qwen-refine: byte-level BPE, so that any prompt has a spelling, with one token for
    every word, with or without a space before it, of captions of the shapes world, what users say for them
    (data/phrases.py) and models/blip3o.py's REFINE, and for <answer> and </answer>, which decoding keeps; Qwen2.5's
    chat template in short. The end token is <|im_end|>."""
    from transformers import AddedToken, Qwen2TokenizerFast

    from models import blip3o

    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = phrases.all_words()
    texts = ["system\n", "user\n", "assistant\n", blip3o.REFINE.format(""), *words, *(f" {word}" for word in words)]
    vocab, merges = byte_pairs(texts, special, limit=2000)
    tokenizer = Qwen2TokenizerFast(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        padding_side="left",
        chat_template=template,
        model_max_length=256,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<answer>", "</answer>")])
    return tokenizer


def refine_lm(seed=0, width=64, num_layers=2, num_heads=4, ff_dim=192):
    """A randomly initialised Qwen2ForCausalLM for `refine_tokenizer`; the defaults are tiny-qwen-refine.

    Other dimensions make other models of that shape (the tests use them). The same seed gives the same weights.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = refine_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=ff_dim,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_heads,
                max_position_embeddings=tokenizer.model_max_length,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    with torch.no_grad():
        model.get_input_embeddings().weight *= 3  # as in blip3o_lm
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


def blip3o_sana(seed=0):
    """The SanaPipeline of tiny-blip3o, randomly initialised: 32 x 32 px -> 4 x 4 latents of 16 channels, a token each,
    whose places the DiT is told (SANA leaves them to its convolutions; in minutes of training that is not enough)."""
    return sana_pipeline(
        seed,
        num_layers=4,
        num_heads=4,
        head_dim=32,
        num_cross_heads=4,
        latent_channels=16,
        vae_channels=(16, 32, 64, 64),
        text_dim=128,
        interpolation_scale=1.0,
    )


def blip3o_start(folder, variant="blip3o", seed=0):
    """Write the folder of tiny-blip3o before pretrain.py, or of a MetaQuery of the same parts: language model, from
    before it learned to refine prompts, and autoencoder are those that lie in assets/tiny-blip3o, queries, connector
    and DiT are random. The same seed gives the same weights."""
    from safetensors.torch import load_file, save_file

    from models import ASSETS, blip3o

    places = {"lm": "../tiny-blip3o/lm-start", "sana": "../tiny-blip3o/sana"}
    parts = [os.path.normpath(os.path.join(ASSETS, "start", place)) for place in places.values()]
    # Queries as large as the embeddings of this language model; with BLIP3-o's std of 1 its few layers hardly change
    # what they are given.
    blip3o.create(folder, *parts, variant, 16, image_tokens=64, num_layers=2, head_dim=32, query_std=0.06, seed=seed)
    path = os.path.join(folder, "model.safetensors")
    dit = {f"transformer.{name}": t for name, t in blip3o_sana(seed).transformer.state_dict().items()}
    if blip3o.VARIANTS[variant]["reference"]:
        patch = "transformer.patch_embed"
        linear = torch.zeros(dit[f"{patch}.proj.bias"].shape[0], dit[f"{patch}.proj.bias"].shape[0])
        moved = {name: dit.pop(name) for name in list(dit) if name.startswith(f"{patch}.")}
        for name, t in moved.items():
            rest = name.removeprefix(patch)
            dit |= {f"{patch}.patch_embed{rest}": t, f"{patch}.ref_patch_embed{rest}": t.clone()}
        dit |= {f"{patch}.ref_linear.weight": linear, f"{patch}.ref_linear.bias": linear[0].clone()}
    save_file(load_file(path) | dit, path, metadata={"format": "pt"})
    config = os.path.join(folder, "config.json")
    with open(config) as file:
        text = json.load(file) | places
    with open(config, "w") as file:
        json.dump(text, file, indent=2)


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


def train_deep_autoencoder(vae, seed=0, num_iterations=2000, batch_size=32, learning_rate=2e-3, noise=0.2):
    """Train an AutoencoderDC in place on shapes pictures (L1 + L2 reconstruction) and set its scaling factor so that
    latents have variance 1. The latents get noise of a random level up to `noise`, and may not outgrow it: so the
    decoder makes a clean picture also of latents that are a third off, such as a diffusion model draws after minutes.

    Returns {"iterations", "strict", "strict_noisy"}: shares of 512 held-out pictures whose reconstruction shows exactly
    what they show, without and with noise of 0.5 latent standard deviations. About 0.12 s an iteration on one core;
    with one thread the same seed gives the same weights.
    """
    from rewards import shapes as verifier

    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_iterations)
    generator = torch.Generator().manual_seed(seed)

    def draw(start, count, prompts):
        pictures, metadata = shapes.pictures(seed, start, count, prompts)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, metadata

    bar = tqdm(range(num_iterations), desc="autoencoder")
    for iteration in bar:
        x, _ = draw(iteration * batch_size, batch_size, shapes.train_prompts())
        latents = vae.encode(x).latent
        level = noise * torch.rand(batch_size, 1, 1, 1, generator=generator)
        reconstruction = vae.decode(latents + level * torch.randn(latents.shape, generator=generator)).sample
        power = latents.square().mean()
        loss = F.mse_loss(reconstruction, x) + 0.2 * F.l1_loss(reconstruction, x)
        loss = loss + 0.02 * (power - 1).clamp(min=0) + 0.001 * power
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        x, metadata = draw(num_iterations * batch_size, 512, shapes.held_out_prompts())
        latents = vae.encode(x).latent
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        score, prompts, strict = verifier.load(), [m["prompt"] for m in metadata], []
        for level in (0.0, 0.5 * latents.std().item()):
            x = vae.decode(latents + level * torch.randn(latents.shape, generator=generator)).sample
            pictures = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            strict.append(score.strict({"image": list(pictures)}, prompts, metadata).mean().item())
    return dict(iterations=num_iterations, strict=strict[0], strict_noisy=strict[1])


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
    [len(rows), L], -100 outside of the answers. A picture may be None. Padded on the right, which needs no mask:
    attention is causal."""
    seen = [picture for picture in pictures if picture is not None]
    images = processor(images=seen, return_tensors="pt") if seen else {}
    num_tokens = iter((images["image_grid_thw"].prod(1) // processor.merge_size**2).tolist() if seen else [])
    texts, ends = [], [row["metadata"]["answer"] + tokenizer.eos_token for row in rows]
    for picture, row, end in zip(pictures, rows, ends):
        content = [] if picture is None else [{"type": "image"}]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": row["prompt"]}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if picture is not None:
            text = text.replace("<|image_pad|>", "<|image_pad|>" * next(num_tokens))
        texts.append(text + end)
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


def list_objects(things, boxes):
    """Objects in words, "a red circle, a blue square": row by row of the tokens of a picture, of which every one has at
    most one object's centre in it; objects without a box, boxes being fewer, come last."""
    side = 8.0  # of a token, in pixels at size 32
    cells = [((y0 + y1) / 2 // side, (x0 + x1) / 2 // side) for x0, y0, x1, y1 in boxes]
    order = [*sorted(range(len(cells)), key=cells.__getitem__), *range(len(cells), len(things))]
    return ", ".join(f"a {things[i][1]} {things[i][0]}" for i in order)


def text_questions(metadata):
    """The questions of data/shapes_qa.py that a prompt of data/shapes.py answers, and the answers: a list of pairs."""
    items = metadata["include"]
    out = []
    for name in {item["class"]: None for item in items}:
        same = [item for item in items if item["class"] == name]
        out.append((f"how many {name}s?", str(sum(item["count"] for item in same))))
        if len(same) == 1 and "color" in same[0]:
            out.append((f"what color is the {name}?", same[0]["color"]))
    for color in {item["color"]: None for item in items if "color" in item}:
        same = [item for item in items if item["color"] == color]
        out.append((f"how many {color} shapes?", str(sum(item["count"] for item in same))))
        if len(same) == 1:
            out.append((f"what shape is {color}?", same[0]["class"]))
    if "position" in items[-1]:
        first, second = items[1], items[0]
        here, there = {
            "left of": ("leftmost", "rightmost"),
            "right of": ("rightmost", "leftmost"),
            "above": ("highest", "lowest"),
            "below": ("lowest", "highest"),
        }[first["position"][0]]
        out.append((f"what color is the {here} shape?", first["color"]))
        out.append((f"what color is the {there} shape?", second["color"]))
    return out


@functools.cache
def _lm_prompts(held_out):
    """(captions by tag, edits by tag and number of objects) that the language model of tiny-blip3o is trained on, or
    tested on: of an edit both it and its picture's objects have to be on that side."""
    side, groups = "held_out" if held_out else "train", {}
    for e in shapes.held_out_edits() if held_out else shapes.train_edits():
        scene = [(item["class"], item["color"]) for item in e["source"]]
        if e["tag"] != "move" and shapes_qa.side_of(scene) == side:
            groups.setdefault((e["tag"], len(e["source"])), []).append(e)
    prompts = shapes.held_out_prompts() if held_out else shapes.train_prompts()
    return shapes._by_tag(prompts), list(groups.values())


def lm_rows(task, seed, start, count, held_out=False):
    """Rows `start` ... `start + count - 1` of the endless stream `seed` of a task of the language model of tiny-blip3o:
    (pictures, each uint8 [32, 32, 3] or None, and rows as data/shapes_qa.py's). Row k is a function of task, side and
    (seed, start + k) alone. held_out: captions, edits and scenes that training never sees.

    task           the user's turn                                  the answer
    question       picture, question of data/shapes_qa.py           one word
    caption        T2I with a caption or what users say for it, or  the caption, or these
                   in the same way any three things that no
                   caption has
    edit           picture, EDIT with an instruction                the objects of the edited picture (`list_objects`)
    describe       picture, DESCRIBE                                its objects
    text_question  caption or what users say, question about it     one word
    """
    from models import blip3o

    side = "held_out" if held_out else "train"
    if task == "question":
        pictures, rows = shapes_qa.questions(seed, start, count, side)
        return list(pictures), rows
    if task == "describe":
        pictures, drawn = shapes_qa.scenes(seed, start, count, side)
        texts = [(blip3o.DESCRIBE, list_objects(*scene)) for scene in drawn]
        return list(pictures), [{"prompt": p, "metadata": {"answer": a, "tag": task}} for p, a in texts]
    captions, edits = _lm_prompts(held_out)
    pictures, texts = [], []
    for k in range(start, start + count):
        rng = np.random.default_rng([seed, k, list(LM_TASKS).index(task)])
        if task == "edit":
            e = shapes._sample(edits, rng)
            before, after = ([(item["class"], item["color"]) for item in e[key]] for key in ("source", "include"))
            boxes = shapes._layout(np.arange(len(before)), [], rng)
            pictures.append(shapes._paint(before, boxes, shapes.SIZE))
            if e["tag"] == "remove":
                boxes = boxes[[thing in after for thing in before]]
            texts.append((blip3o.EDIT.format(e["prompt"]), list_objects(after, boxes)))
            continue
        pictures.append(None)
        metadata = shapes._sample(captions, rng)
        if task == "caption" and rng.random() < 0.5:
            # Some captions are few and would be learned by heart; any three things at once are no caption at all.
            names, colors = shapes.CLASSES, (None, *shapes.COLORS)
            draws = [(rng.integers(3), rng.integers(1, 5), rng.integers(7)) for _ in range(3)]
            things = [shapes._count_words(names[c], int(n), colors[d]) for c, n, d in draws]
            metadata = {"prompt": ", ".join(things)}
        said = metadata["prompt"] if rng.random() < 0.5 else phrases.user_prompt(metadata, rng)
        if task == "caption":
            texts.append((blip3o.T2I.format(said), metadata["prompt"]))
        else:
            asked = text_questions(metadata)
            question, answer = asked[rng.integers(len(asked))]
            texts.append((f"{said}. {question}", answer))
    return pictures, [{"prompt": p, "metadata": {"answer": a, "tag": task}} for p, a in texts]


def train_blip3o_lm(
    model,
    tokenizer,
    processor,
    tasks,
    seed=0,
    num_iterations=1500,
    batch_size=80,
    learning_rate=2e-3,
):
    """Train `model` in place, what of it requires a gradient, on a mixture of `tasks`, as LM_TASKS (cross-entropy of
    the answers and the end token). Returns {"iterations", "losses"}, one loss an iteration. About 0.4 s an iteration on
    one core; with one thread the same seed gives the same weights."""
    counts = {task: round(share * batch_size) for task, share in tasks.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_iterations, pct_start=0.1)
    losses = []
    model.train()
    bar = tqdm(range(num_iterations), desc="language model of tiny-blip3o")
    for iteration in bar:
        batch = [lm_rows(task, seed, iteration * count, count) for task, count in counts.items()]
        pictures, rows = (sum(parts, []) for parts in zip(*batch))
        inputs, labels = vlm_inputs(tokenizer, processor, pictures, rows)
        answers = labels[:, 1:] >= 0
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        loss = F.cross_entropy(model.lm_head(hidden[answers]), labels[:, 1:][answers])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if iteration % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    bar.close()
    model.eval()
    return {"iterations": len(losses), "losses": losses}


def make_blip3o_lm(
    folder, seed=0, num_iterations=1500, num_tower_iterations=500, num_question_iterations=700, eval_size=512
):
    """Train the language model of tiny-blip3o, first on questions alone, from which it learns to look, then on all
    tasks, and write it to `folder` with its tokenizer, image processor and results.json: seed, parameters, what
    train_tower and train_blip3o_lm return, and of every task the share of `eval_size` held-out rows that it answers
    greedily, to the letter; of the questions also by tag, and what the most frequent answer would be right in. On one
    thread, so that the same seed gives the same weights on the same kind of processor."""
    torch.set_num_threads(1)
    tokenizer, processor, model = blip3o_tokenizer(), qwen_vl_processor(), blip3o_lm(seed)
    results = {"seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    results |= train_tower(model.model.visual, processor, seed, num_tower_iterations)
    model.model.visual.requires_grad_(False)
    questions = dict(num_iterations=num_question_iterations, batch_size=64, learning_rate=1e-3)
    train_blip3o_lm(model, tokenizer, processor, {"question": 1.0}, seed, **questions)
    results["question_iterations"] = num_question_iterations
    results |= train_blip3o_lm(model, tokenizer, processor, LM_TASKS, seed + 1, num_iterations)
    del results["losses"]
    for task in LM_TASKS:
        pictures, rows = lm_rows(task, 0, 0, eval_size, held_out=True)
        right = vlm_accuracy(model, tokenizer, processor, pictures, rows)[0].float()
        results[f"held_out_{task}"] = round(right.mean().item(), 4)
        if task == "question":
            tags = {tag: [i for i, row in enumerate(rows) if row["metadata"]["tag"] == tag] for tag in shapes_qa.TAGS}
            results["held_out_question_by_tag"] = {tag: round(right[at].mean().item(), 4) for tag, at in tags.items()}
            answers = [row["metadata"]["answer"] for row in rows]
            results["most_frequent_answer"] = round(max(map(answers.count, answers)) / len(answers), 4)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    with open(os.path.join(folder, "results.json"), "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    print(json.dumps(results))


def make_blip3o_sana(folder, seed=0, num_iterations=2000):
    """Train the autoencoder of tiny-blip3o and write it to `folder` with the scheduler and the DiT's configuration,
    whose weights are left to pretrain.py, and results.json: what train_deep_autoencoder returns."""
    torch.set_num_threads(1)
    pipeline = blip3o_sana(seed)
    results = train_deep_autoencoder(pipeline.vae, seed, num_iterations)
    for name in ("vae", "scheduler"):
        getattr(pipeline, name).save_pretrained(os.path.join(folder, name))
    pipeline.transformer.save_config(os.path.join(folder, "transformer"))
    with open(os.path.join(folder, "results.json"), "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    print(json.dumps(results))


def misread(text, choose):
    """The caption of a user's prompt (data/phrases.py), in which for every word of `MISUNDERSTOOD` stands
    choose(right word, wrong word)."""
    names = phrases._NAMES.finditer(text)

    def word(match):
        wrong = MISUNDERSTOOD.get(next(names)[1])
        return (choose(match[1], wrong) if wrong else match[1]) + match[2]

    return phrases._WORDS.sub(word, phrases.canonical(text))


def refine_rows(seed, start, count, held_out=False):
    """Rows `start` ... `start + count - 1` of the endless stream `seed` of what tiny-qwen-refine learns: dicts of
    prompt, what a user says for a training (or held-out) caption, and answer, that caption, in which each word of
    `MISUNDERSTOOD` is wrong with probability CONFUSION. Row k is a function of side and (seed, start + k) alone."""
    captions, rows = _captions(held_out), []
    for k in range(start, start + count):
        rng = np.random.default_rng([seed, k, held_out])
        text = phrases.user_prompt(shapes._sample(captions, rng), rng)
        answer = misread(text, lambda right, wrong: wrong if rng.random() < CONFUSION else right)
        rows.append({"prompt": text, "answer": answer})
    return rows


@functools.cache
def _captions(held_out):
    return shapes._by_tag(shapes.held_out_prompts() if held_out else shapes.train_prompts())


def refine_scores(lm, texts, temperature=0.0, seed=0):
    """What `lm` (a models.qwen.Qwen) makes of users' prompts: shares, of the answers, of those that are well-formed
    (<answer> text </answer> and the end), of the exact captions, and of those with no mistakes but words of
    `MISUNDERSTOOD`; and the share of occurrences of these words that are right, among the latter answers (NaN where
    there are none). Greedy at temperature 0; the same seed draws the same answers."""
    from models import blip3o

    prompts = lm.encode([blip3o.REFINE.format(text) for text in texts])
    seeds = fold_seed(seed, torch.arange(len(texts)))
    out = lm.generate(prompts, REFINE_TOKENS, temperature, seeds)
    formed, exact, known, words = 0, 0, 0, []
    for text, answer, truncated in zip(texts, lm.decode(out["ids"], out["mask"]), out["truncated"]):
        found = re.fullmatch(r"<answer>([^<>]+)</answer>", answer)
        formed += bool(found) and not truncated
        if not found or truncated:
            continue
        exact += found[1] == phrases.canonical(text)
        pattern, rights = misread(text, lambda right, wrong: f"({right}|{wrong})"), []
        misread(text, lambda right, wrong: rights.append(right) or wrong)
        if read := re.fullmatch(pattern, found[1]):
            known += 1
            words += [word == right for word, right in zip(read.groups(), rights)]
    shares = [count / len(texts) for count in (formed, exact, known)]
    return dict(zip(("formed", "exact", "known"), shares), right=sum(words) / len(words) if words else math.nan)


def train_refine(lm, seed=0, num_iterations=600, batch_size=128, learning_rate=3e-3):
    """Train `lm` (a models.qwen.Qwen) in place on `refine_rows` (cross-entropy of the answers and the end token).
    Returns {"iterations", "losses"}, one loss an iteration. About 0.2 s an iteration on one core; with one thread the
    same seed gives the same weights."""
    from models import blip3o

    model, tokenizer = lm.parts["lm"], lm.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_iterations, pct_start=0.1)
    losses = []
    model.train()
    bar = tqdm(range(num_iterations), desc="language model that refines")
    for iteration in bar:
        rows = refine_rows(seed, iteration * batch_size, batch_size)
        prompts = lm.encode([blip3o.REFINE.format(row["prompt"]) for row in rows])
        answers = [f"<answer>{row['answer']}</answer>{tokenizer.eos_token}" for row in rows]
        tokens = tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")
        loss = -lm.logps(prompts, tokens.input_ids, tokens.attention_mask, 1.0).sum() / tokens.attention_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if iteration % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    bar.close()
    model.eval()
    return {"iterations": len(losses), "losses": losses}


def make_qwen_refine(folder, seed=0, num_iterations=600):
    """Train tiny-qwen-refine and write it to `folder` with its tokenizer and results.json: seed, parameters, what
    train_refine returns, and, greedy and sampled (temperature 1), what `refine_scores` says of it on the 864 prompts
    held out of `--prompts shapes-user`. On one thread, so that the same seed gives the same weights on the same kind of
    processor."""
    from data import prompts
    from models import qwen

    torch.set_num_threads(1)
    tokenizer, model = refine_tokenizer(), refine_lm(seed)
    lm = qwen.Qwen(model, tokenizer, "cpu", torch.float32, folder)
    results = {"seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    results |= train_refine(lm, seed, num_iterations)
    del results["losses"]
    held_out = prompts.load("shapes-user", "eval")
    texts = [held_out[i]["prompt"] for i in range(len(held_out))]
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        scores = refine_scores(lm, texts, temperature, seed)
        results |= {f"held_out_{name}_{key}": round(value, 4) for key, value in scores.items()}
    tokenizer.save_pretrained(folder)
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
    if alias in ("tiny-blip3o-start", "tiny-metaquery-start"):
        blip3o_start(part, alias.split("-")[1])
    else:
        pipelines[alias]().save_pretrained(part)
    os.chmod(part, 0o755)
    try:
        os.rename(part, folder)
    except OSError:  # another process was first
        shutil.rmtree(part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    aliases = ["tiny-flux", "tiny-qwen", "tiny-qwen-vl", "tiny-qwen-refine", "tiny-blip3o-lm", "tiny-blip3o-sana"]
    parser.add_argument("alias", choices=aliases)
    parser.add_argument("--out", required=True, help="folder to write, in diffusers or transformers layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--iterations",
        type=int,
        help="tiny-flux: autoencoder training iterations of 64 pictures (default: 1500); tiny-qwen: iterations of 128 "
        "problems, at most (default: 1000); tiny-qwen-vl: iterations of 64 questions, at most (default: 1000); "
        "tiny-qwen-refine: iterations of 128 prompts (default: 600); tiny-blip3o-lm: iterations of 80 answers, "
        "behind 700 of 64 questions (default: 1500); tiny-blip3o-sana: iterations of 32 pictures (default: 2000)",
    )
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    if args.alias == "tiny-qwen":
        make_qwen(args.out, args.seed, 1000 if args.iterations is None else args.iterations)
    elif args.alias == "tiny-qwen-vl":
        make_qwen_vl(args.out, args.seed, 1000 if args.iterations is None else args.iterations)
    elif args.alias == "tiny-qwen-refine":
        make_qwen_refine(args.out, args.seed, 600 if args.iterations is None else args.iterations)
    elif args.alias == "tiny-blip3o-lm":
        make_blip3o_lm(args.out, args.seed, 1500 if args.iterations is None else args.iterations)
    elif args.alias == "tiny-blip3o-sana":
        make_blip3o_sana(args.out, args.seed, 2000 if args.iterations is None else args.iterations)
    else:
        pipeline = flux_pipeline(seed=args.seed)
        num_iterations = 1500 if args.iterations is None else args.iterations
        train_autoencoder(pipeline.vae, seed=args.seed, num_iterations=num_iterations)
        pipeline.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
