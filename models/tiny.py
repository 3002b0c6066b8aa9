"""
Tiny pipelines in the real formats: the real diffusers / transformers classes with small dimensions, real (small)
tokenizers, saved in the real folder layout, so that `--model tiny-flux` runs the very code that `--model flux` runs.

    python -m models.tiny tiny-flux --out outputs/tiny-flux-start      # tokenizers, encoders, trained autoencoder,
    untrained transformer

The text encoders stay at their random start (a random transformer is a fine feature map for twenty words). The
autoencoder is trained here, for minutes, on pictures of the shapes world; the transformer is left to pretrain.py
(runs/tiny_flux.sh).
"""

import argparse
import json
import os

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import shapes

TEXT_TOKENS = 12  # the longest shapes prompt is 8 words; T5's </s> and padding fill the rest


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
):
    """A randomly initialised FluxPipeline; the defaults are tiny-flux: 32 x 32 px -> 8 x 8 latents -> 16 tokens.

    Other dimensions make other FLUX-shaped folders (the tests use them). The same seed gives the same weights.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    rope = 2 * (3 * head_dim // 16)  # FLUX splits 128 as 16 + 56 + 56; every share must be even
    texts = [metadata["prompt"] for metadata in shapes.all_prompts()]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("alias", choices=["tiny-flux"])
    parser.add_argument("--out", required=True, help="folder to write, in diffusers layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=1500, help="autoencoder training iterations of 64 pictures")
    args = parser.parse_args()
    pipeline = flux_pipeline(seed=args.seed)
    train_autoencoder(pipeline.vae, seed=args.seed, num_iterations=args.iterations)
    os.makedirs(args.out, exist_ok=True)
    pipeline.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
