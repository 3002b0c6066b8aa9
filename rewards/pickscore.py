"""PickScore (https://arxiv.org/abs/2305.01569): a CLIP ViT-H/14 tuned on human choices between pictures of a prompt.

    score = exp(logit_scale) * cos(text, image) / 26

exp(logit_scale) is about 100 and raw scores are 18 to 24; the published Flow-GRPO recipes divide by 26, which brings
them near 1 (0.7 to 0.95) but does not bound them. Compare scores within one prompt, not across prompts.

The picture is CLIP's centre crop: of a 1024 x 576 one the sides are not seen. The text is cut at 77 tokens.
fp32 throughout: bf16 would quantise the cosine in steps of 0.001, as large as the differences inside one group.
"""

from rewards.clip import load_clip, score_rows

MODEL = "yuvalkirstain/PickScore_v1"  # 986 M parameters, 3.9 GB
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the checkpoint it was tuned from; only its tokenizer and resize


def load(device="cpu", model=MODEL, processor=PROCESSOR):
    """PickScore / 26 of samples["image"] under `prompts`; `model`, `processor`: hub ids or local folders.

    Raises RuntimeError if they are neither local nor to be had from the hub.
    """
    clip = load_clip("pickscore", model, processor, device)
    scale = clip.model.logit_scale.exp() / 26

    def forward(pictures, prompts):
        return scale * (clip.images(pictures) * clip.texts(prompts)).sum(-1)

    def score(samples, prompts, metadata):
        return score_rows("pickscore", forward, {"pictures": samples["image"]}, {"prompts": prompts})

    score.needs, score.strict = ("image",), None
    return score
