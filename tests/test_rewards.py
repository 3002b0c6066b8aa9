import io
import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import rewards
from data import shapes
from rewards import pickscore

SIZE = 28  # of the tiny CLIP's picture
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red circle", "two blue squares left of a green triangle", "", "A Red  Circle!", "seven cats, 日本"]
SIZES = [(40, 40), (28, 28), (33, 71), (90, 31), (7, 9)]  # H, W: larger, equal, wide, tall, smaller than the model's


def picture(seed, height=24, width=24):
    """Coarse colour blocks, so that pictures differ after the resize too."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


# ---------------------------------------------------------------------------------------------------------------------
# jpeg


def jpeg_bytes(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=95, subsampling="4:2:0")
    return len(file.getvalue())


def test_jpeg_equals_direct_encoding():
    flat = np.full((64, 48, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    images = [flat, picture(0, 33, 65), picture(1, 1, 1), noise]
    expected = torch.tensor([float(jpeg_bytes(image)) for image in images])
    samples, prompts, metadata = {"image": images}, [""] * 4, [{}] * 4

    small = rewards.load("jpeg")(samples, prompts, metadata)
    large = rewards.load("jpeg_incompressibility")(samples, prompts, metadata)

    assert small.dtype == large.dtype == torch.float32 and small.shape == large.shape == (4,)
    torch.testing.assert_close(large, expected / 1000)
    torch.testing.assert_close(small, -expected / 500_000)
    assert small[0] > small[3] and large[0] < large[3]  # flat compresses better than noise of the same size


# ---------------------------------------------------------------------------------------------------------------------
# pickscore, on a tiny CLIP with random weights in the real folder format


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-clip")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([p.lower() for p in PROMPTS], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizer(vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]])
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    bos, eos = tokenizer.convert_tokens_to_ids(specials)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, **sizes}
    vision = {"image_size": SIZE, "patch_size": 14, **sizes}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    # Freshly initialised towers hardly see their input; larger weights spread the scores.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    model.save_pretrained(folder)
    # The image processor as the hub's CLIP repositories of 2022 have it: integer sizes and the old class name.
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE, "resample": 3}
    processor |= {"do_resize": True, "do_center_crop": True, "do_normalize": True, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def score(tiny):
    return pickscore.load("cpu", model=tiny[0], processor=tiny[0])


def clip_pixels(image):
    """CLIP's preprocessing written out: shortest edge to SIZE, bicubic; centre crop; mean and std per channel."""
    height, width = image.shape[:2]
    new = (SIZE, SIZE * height // width) if width < height else (SIZE * width // height, SIZE)  # W, H
    resized = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))
    top, left = (new[1] - SIZE) // 2, (new[0] - SIZE) // 2
    x = resized[top : top + SIZE, left : left + SIZE] / 255.0
    return torch.tensor((x - np.array(MEAN)) / np.array(STD)).float().permute(2, 0, 1)


def test_pickscore_equals_diagonal_of_clip_logits(tiny, score):
    _, model, tokenizer = tiny
    images = [picture(i, *size) for i, size in enumerate(SIZES)]
    got = score({"image": images}, PROMPTS, [{}] * 5)

    text = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = model(**text, pixel_values=torch.stack([clip_pixels(image) for image in images])).logits_per_image

    assert got.dtype == torch.float32 and got.shape == (5,) and got.device.type == "cpu"
    torch.testing.assert_close(got, logits.diagonal() / 26, atol=1e-6, rtol=0)
    # The comparison means something: neither picture nor prompt is interchangeable.
    assert (logits / 26).std(0).min() > 1e-3 and (logits / 26).std(1).min() > 1e-3


def test_pickscore_does_not_depend_on_the_batch(score):
    images = [picture(i, 30 + i, 50 - i) for i in range(37)]  # one batch of 32 and a rest of 5
    prompts = [PROMPTS[i % 5] for i in range(37)]
    got = score({"image": images}, prompts, [{}] * 37)
    single = torch.cat([score({"image": [i]}, [p], [{}]) for i, p in zip(images, prompts)])
    torch.testing.assert_close(got, single, atol=1e-6, rtol=0)

    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = score({"image": [images[i] for i in order]}, [prompts[i] for i in order], [{}] * 37)
    torch.testing.assert_close(shuffled, got[order], atol=1e-6, rtol=0)
    assert score({"image": []}, [], []).shape == (0,)


def test_pickscore_cuts_long_prompts_at_77_tokens(score):
    image = {"image": [picture(0)]}
    long = "red circle " * 200
    got = score(image, [long], [{}])
    assert got.isfinite().all()
    torch.testing.assert_close(got, score(image, [long + "blue squares"], [{}]), atol=0, rtol=0)  # behind the cut
    assert (got - score(image, ["blue " + long], [{}])).abs() > 1e-4  # before it


def test_pickscore_that_is_not_finite_is_nan(tiny, score, tmp_path):
    _, model, tokenizer = tiny
    broken = CLIPModel(model.config)
    broken.load_state_dict(model.state_dict())
    poison = set(tokenizer("green").input_ids) - set(tokenizer("a red circle").input_ids)
    with torch.no_grad():
        broken.text_model.embeddings.token_embedding.weight[list(poison)] = math.nan
    broken.save_pretrained(tmp_path)
    prompts, images = ["a red circle", "green", "a red circle"], [picture(0), picture(1), picture(2)]
    got = pickscore.load(model=tmp_path, processor=tiny[0])({"image": images}, prompts, [{}] * 3)
    assert poison and got.isnan().tolist() == [False, True, False]  # the neighbours in the batch keep their scores
    torch.testing.assert_close(got[::2], score({"image": images}, prompts, [{}] * 3)[::2], atol=1e-6, rtol=0)

    with torch.no_grad():
        broken.logit_scale.fill_(1000)  # exp overflows: infinite, not NaN
    broken.save_pretrained(tmp_path)
    assert pickscore.load(model=tmp_path, processor=tiny[0])({"image": images}, prompts, [{}] * 3).isnan().all()


def test_pickscore_wants_a_prompt_for_every_picture(score):
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        score({"image": [picture(0), picture(1)]}, ["red"], [{}])


def test_pickscore_refuses_a_tokenizer_without_its_files(tiny, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text((tiny[0] / "preprocessor_config.json").read_text())
    with pytest.raises(RuntimeError, match="tokenizer of .* tokens, text model of"):
        pickscore.load(model=tiny[0], processor=tmp_path)


def test_pickscore_offline_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing cached
    with pytest.raises(RuntimeError) as error:
        rewards.load("pickscore")
    message = str(error.value)
    assert "hf download yuvalkirstain/PickScore_v1 " in message
    assert "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K " in message
    assert len(message.splitlines()) == 2 and error.value.__suppress_context__


# ---------------------------------------------------------------------------------------------------------------------
# names and weights


def test_parse_reads_names_weights_and_urls():
    assert rewards.parse(["pickscore:0.7", "jpeg", "shapes:-2"]) == [
        ("pickscore", "pickscore", 0.7),
        ("jpeg", "jpeg", 1.0),
        ("shapes", "shapes", -2.0),
    ]
    assert rewards.parse(["http://host:18083/pickscore:0.7", "https://[::1]:80/v1/ocr", "http://h/x:1e-3"]) == [
        ("http://host:18083/pickscore", "pickscore", 0.7),
        ("https://[::1]:80/v1/ocr", "ocr", 1.0),
        ("http://h/x", "x", 1e-3),
    ]


@pytest.mark.parametrize(
    "specs, why",
    [
        (["jpeg", ""], "no name"),
        ([":0.5"], "no name"),
        (["jpeg:"], "not a finite number"),
        (["jpeg:high"], "not a finite number"),
        (["jpeg:0"], "not a finite number"),
        (["jpeg:nan"], "not a finite number"),
        (["jpeg:-inf"], "not a finite number"),
        (["jpeg:1e999"], "not a finite number"),
        (["http://host:18083"], "a URL must name the reward"),
        (["http://host:18083/"], "a URL must name the reward"),
        (["http://host:18083/:0.7"], "a URL must name the reward"),
        (["http:///pickscore:0.7"], "a URL must name the reward"),
        (["http://host:80/pickscore:high"], "not a finite number"),
        (["jpeg:0.3", "jpeg:0.7"], "already a reward"),
        (["jpeg", "http://host:80/jpeg:2"], "already a reward"),
    ],
)
def test_parse_names_the_bad_spec(specs, why):
    with pytest.raises(ValueError, match=why) as error:
        rewards.parse(specs)
    assert repr(specs[-1]) in str(error.value) and "\n" not in str(error.value)


def test_parse_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no reward given"):
        rewards.parse([])


def test_load_of_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown reward 'pikscore', did you mean 'pickscore'") as error:
        rewards.load("pikscore")
    assert all(name in str(error.value) for name in ("jpeg", "jpeg_incompressibility", "pickscore", "shapes"))
    with pytest.raises(ValueError, match=r"unknown reward 'zzz' \(known"):
        rewards.load("zzz")
    with pytest.raises(ValueError, match="expected http://host:port/name"):
        rewards.load("http://host:eighty/pickscore")


def test_every_row_of_the_table_names_a_loader():
    for name, reward in rewards.REWARDS.items():
        module, function = reward.loader.split(":")
        assert callable(getattr(import_module(f"rewards.{module}"), function)), name
        assert set(reward.needs) <= {"image", "text", "source", "recon"} and reward.needs
        assert all(path.count("/") >= 2 for path in reward.weights) and (reward.gigabytes > 0) == bool(reward.weights)


def test_weightless_rewards_read_the_roles_of_the_table():
    for name, reward in rewards.REWARDS.items():
        if not (reward.weights or reward.judge):
            assert rewards.load(name).needs == reward.needs and rewards.missing(name) == [], name


def test_what_is_missing_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert rewards.missing("hpsv2.1")[0] == "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"
    assert rewards.missing("clipscore") == ["hf download openai/clip-vit-large-patch14"]
    assert rewards.missing("hpsv3")[-1] == "python -m rewards fetch hpsv3"
    assert rewards.missing("vlm_judge") == ["a server at --judge-url"]


def run_module(*argv):
    command = [sys.executable, "-m", "rewards", *argv]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(rewards.__file__).parents[1]
    )


def test_command_line_lists_and_scores(tmp_path):
    listed = run_module().stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == list(rewards.REWARDS)
    assert next(line for line in listed if line.startswith("jpeg ")).endswith("ready")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    scored = run_module(
        "score", "--reward", "jpeg", "psnr", "--image", f"{tmp_path}/a.png", "--source", f"{tmp_path}/a.png"
    )
    want = rewards.load("jpeg")({"image": [picture]}, [""], [{}]).item()
    assert json.loads(scored.stdout) == {"jpeg": want, "psnr": 50.0}
    answer = run_module("score", "--reward", "math", "--text", "<answer>7</answer>", "--metadata", '{"answer": 7}')
    assert json.loads(answer.stdout) == {"math": 1.0, "math/strict": 1.0}
    for argv, message in [
        (("--reward", "jpeg"), "error: reward 'jpeg' scores 'image', but this run only has"),
        (("--reward", "jpeg", "--image", "none.png"), "error: none.png: expected a picture"),
        (("--reward", "pikscore"), "error: unknown reward 'pikscore', did you mean 'pickscore'"),
    ]:
        failed = run_module("score", *argv)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr


def test_check_needs_names_reward_and_role():
    score = rewards.load("jpeg")
    rewards.check_needs(score, ("image", "text"))
    with pytest.raises(ValueError, match="'jpeg'.*'image'.*'text', 'source'"):
        rewards.check_needs(score, ("text", "source"))


# ---------------------------------------------------------------------------------------------------------------------
# shapes, through the contract that all rewards share; what it measures has tests of its own


def test_shapes_loads_by_name_with_a_strict_form():
    score = rewards.load("shapes", device="cpu")
    assert score.name == "shapes" and tuple(score.needs) == ("image",)
    rewards.check_needs(score, ("image",))
    wanted = [p for p in shapes.held_out_prompts() if p["tag"] in ("colors", "position")][:8]
    images = [shapes.draw(m, np.random.default_rng(i)) for i, m in enumerate(wanted)]
    images[3] = np.full_like(images[3], 255)  # nothing drawn
    args = {"image": images}, [m["prompt"] for m in wanted], wanted

    soft, strict = score(*args), score.strict(*args)

    assert soft.dtype == strict.dtype == torch.float32 and soft.shape == strict.shape == (len(wanted),)
    assert strict.tolist() == [float(i != 3) for i in range(len(wanted))]
    assert soft[3] < 0.1 and soft[[i for i in range(len(wanted)) if i != 3]].min() > 0.8
    assert rewards.load("jpeg").strict is None


def test_what_a_reward_misses_in_the_metadata_is_found_with_one_blank_sample():
    score, seen = rewards.load("shapes"), []

    def look(samples, prompts, metadata):
        seen.append((samples, prompts, metadata))
        return torch.zeros(1)

    look.strict = None
    wanted = shapes.train_prompts()[0]
    row = {"prompt": wanted["prompt"], "metadata": wanted}
    rewards.try_out([score, look], row, 16)
    ((samples, prompts, metadata),) = seen
    assert samples["image"][0].shape == (16, 16, 3) and samples["text"] == [""] and prompts == [row["prompt"]]
    assert metadata == [wanted] and samples.keys() == {"image", "source", "recon", "text"}
    with pytest.raises(ValueError, match="shapes reward"):
        rewards.try_out([look, score], {"prompt": "a cat", "metadata": {}})
    score.strict, look.strict = None, score.strict  # strict forms are tried, too
    with pytest.raises(ValueError, match="shapes reward"):
        rewards.try_out([look], {"prompt": "a cat", "metadata": {}})
