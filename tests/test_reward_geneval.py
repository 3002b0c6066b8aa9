import io
import json
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from data.shapes import box_offset
from rewards import geneval
from rewards.geneval import CLASSES, COLORS

SHORT, LONG = 64, 107  # edges of the tiny detector
SIZE = 28  # of the tiny CLIP's picture


def picture(seed, height=24, width=24):
    """Coarse colour blocks, so that pictures differ after the resize too."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(
    "a, b, offset, expected",
    [
        ([0, 0, 10, 10], [90, 0, 100, 10], (-0.97778, 0), {"left of"}),
        ([0, 0, 100, 100], [15, 0, 115, 100], (0, 0), set()),  # offset 15, shrunk by 20
        ([0, 0, 10, 10], [100, 100, 110, 110], (-0.69296, -0.69296), {"left of", "above"}),
        ([200, 40, 260, 100], [0, 0, 100, 100], (0.90554, 0.02209), {"right of"}),
        ([0, 0, 10, 10], [100, 60, 110, 70], (-0.84034, -0.49735), {"left of"}),
        ([5, 90, 15, 100], [0, 0, 20, 20], (0, 0.96471), {"below"}),
        ([0, 0, 10, 10], [0, 0, 10, 10], (0, 0), set()),
        ([0, 0, 10, 10], [4, 0, 14, 10], (-0.5, 0), set()),  # (4 - 2) / 4: 0.5 itself is no relation
        ([0, 0, 100, 100], [39, 0, 139, 100], (-19 / 39, 0), set()),
        ([0, 0, 100, 100], [41, 0, 141, 100], (-21 / 41, 0), {"left of"}),
    ],
)
def test_relations_of_two_boxes(a, b, offset, expected):
    np.testing.assert_allclose(box_offset(a, b), offset, atol=1e-5)
    assert geneval.relations(a, b) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert geneval.relations(b, a) == {opposite[name] for name in expected}


LEFT, RIGHT, FAR, TOP = [0, 40, 20, 60], [80, 40, 100, 60], [180, 40, 200, 60], [80, 0, 100, 20]


def boxes(*colours, at=LEFT):
    return [(at, colour) for colour in colours]


def want(name, count=1, **more):
    return {"class": name, "count": count, **more}


DOG, THREE = [want("dog")], [want("dog", 3)]
PAIR, RED, TWO_RED = [want("dog"), want("cat")], [want("dog", color="red")], [want("dog", 2, color="red")]
LEFT_OF = [want("dog"), want("cat", position=["left of", 0])]
LEFT_OF_RED = [want("dog", color="red"), want("cat", position=["left of", 0])]
RED_LEFT_OF = [want("dog"), want("cat", color="red", position=["left of", 0])]
TWO_LEFT_OF = [want("dog"), want("cat", 2, position=["left of", 0])]
LEFT_OF_TWO = [want("dog", 2), want("cat", position=["left of", 0])]
CHAIN = [want("dog"), want("cat", position=["left of", 0]), want("cow", position=["above", 1])]
TWO_COLOURS = [want("dog", color="red"), want("cat", color="blue")]
TWICE = [want("dog", color="red"), want("dog", color="blue")]
NO_FOURTH, NO_CAT = [want("dog", 4)], [want("cat")]
DOG_RIGHT, CAT_LEFT, CAT_FAR = boxes(None, at=RIGHT), boxes(None, at=LEFT), boxes(None, at=FAR)
RED_RIGHT, BLUE_RIGHT = boxes("red", at=RIGHT), boxes("blue", at=RIGHT)

# what is asked for, too many of what, what is found; strict, credits whose mean is soft
CASES = {
    "one, none found": (DOG, [], {}, 0, [0]),
    "one, another class found": (DOG, [], {"cat": boxes(None)}, 0, [0]),
    "one, found": (DOG, [], {"dog": boxes(None)}, 1, [1]),
    "one, among others": (DOG, [], {"dog": boxes(None), "cat": boxes(None, None)}, 1, [1]),
    "one, two found": (DOG, [], {"dog": boxes(None, None)}, 1, [0]),
    "one, ten found: no negative credit": (DOG, [], {"dog": boxes(*[None] * 10)}, 1, [0]),
    "three, none found": (THREE, NO_FOURTH, {}, 0, [0]),
    "three, one found": (THREE, NO_FOURTH, {"dog": boxes(None)}, 0, [1 / 3]),
    "three, two found": (THREE, NO_FOURTH, {"dog": boxes(None, None)}, 0, [2 / 3]),
    "three, found": (THREE, NO_FOURTH, {"dog": boxes(None, None, None)}, 1, [1]),
    "three, four found": (THREE, NO_FOURTH, {"dog": boxes(*[None] * 4)}, 0, [2 / 3]),
    "three, sixteen found": (THREE, NO_FOURTH, {"dog": boxes(*[None] * 16)}, 0, [0]),
    "three, four found and allowed": (THREE, [], {"dog": boxes(*[None] * 4)}, 1, [2 / 3]),
    "no cat, found": (DOG, NO_CAT, {"dog": boxes(None), "cat": boxes(None)}, 0, [1]),
    "no cat, none found": (DOG, NO_CAT, {"dog": boxes(None)}, 1, [1]),
    "two classes, found": (PAIR, [], {"dog": boxes(None), "cat": boxes(None)}, 1, [1, 1]),
    "two classes, one found": (PAIR, [], {"cat": boxes(None)}, 0, [0, 1]),
    "two classes, one twice": (PAIR, [], {"dog": boxes(None), "cat": boxes(None, None)}, 1, [1, 0]),
    "red, none found": (RED, [], {}, 0, [0, 0]),
    "red, found": (RED, [], {"dog": boxes("red")}, 1, [1, 1]),
    "red, blue found": (RED, [], {"dog": boxes("blue")}, 0, [1, 0]),
    "red, the most confident is": (RED, [], {"dog": boxes("red", None)}, 1, [0, 0]),
    "red, the second is": (RED, [], {"dog": boxes("blue", "red")}, 0, [0, 0]),
    "two red, one is blue": (TWO_RED, [], {"dog": boxes("red", "blue")}, 0, [1, 1 / 2]),
    "two red, found": (TWO_RED, [], {"dog": boxes("red", "red")}, 1, [1, 1]),
    "two red, one found": (TWO_RED, [], {"dog": boxes(None)}, 0, [1 / 2, 0]),
    "two red, three found": (TWO_RED, [], {"dog": boxes("red", "red", None)}, 1, [1 / 2, 0]),
    "two colours, swapped": (TWO_COLOURS, [], {"dog": boxes("blue"), "cat": boxes("red")}, 0, [1, 0, 1, 0]),
    "two colours, right": (TWO_COLOURS, [], {"dog": boxes("red"), "cat": boxes("blue")}, 1, [1, 1, 1, 1]),
    "one class in two colours": (TWICE, [], {"dog": boxes("red")}, 0, [1, 1, 1, 0]),
    "place, right": (LEFT_OF, [], {"dog": DOG_RIGHT, "cat": CAT_LEFT}, 1, [1, 1, 1]),
    "place, wrong: no half credit": (LEFT_OF, [], {"dog": DOG_RIGHT, "cat": CAT_FAR}, 0, [1, 1, 0]),
    "place, target missing": (LEFT_OF, [], {"cat": CAT_LEFT}, 0, [0, 1, 0]),
    "place, object missing": (LEFT_OF, [], {"dog": DOG_RIGHT}, 0, [1, 0, 0]),
    "place, the most confident is": (LEFT_OF, [], {"dog": DOG_RIGHT, "cat": CAT_LEFT + CAT_FAR}, 1, [1, 0, 0]),
    "place, the second is": (LEFT_OF, [], {"dog": DOG_RIGHT, "cat": CAT_FAR + CAT_LEFT}, 0, [1, 0, 0]),
    "place, two targets": (LEFT_OF, [], {"dog": DOG_RIGHT + boxes(None), "cat": CAT_LEFT}, 1, [0, 1, 0]),
    "place of two, one wrong": (TWO_LEFT_OF, [], {"dog": DOG_RIGHT, "cat": CAT_LEFT + CAT_FAR}, 0, [1, 1, 0]),
    "place of two, right": (TWO_LEFT_OF, [], {"dog": DOG_RIGHT, "cat": CAT_LEFT * 2}, 1, [1, 1, 1]),
    "place to two, right": (LEFT_OF_TWO, [], {"dog": DOG_RIGHT + CAT_FAR, "cat": CAT_LEFT}, 1, [1, 1, 1]),
    "place to two, one wrong": (LEFT_OF_TWO, [], {"dog": CAT_FAR + boxes(None), "cat": DOG_RIGHT}, 0, [1, 1, 0]),
    "place, target blue": (LEFT_OF_RED, [], {"dog": BLUE_RIGHT, "cat": CAT_LEFT}, 0, [1, 0, 1, 0]),
    "place, target red": (LEFT_OF_RED, [], {"dog": RED_RIGHT, "cat": CAT_LEFT}, 1, [1, 1, 1, 1]),
    "place and colour, wrong place": (RED_LEFT_OF, [], {"dog": boxes(None), "cat": RED_RIGHT}, 0, [1, 1, 1, 0]),
    "place and colour, right": (RED_LEFT_OF, [], {"dog": DOG_RIGHT, "cat": boxes("red")}, 1, [1, 1, 1, 1]),
    "place and colour, wrong colour": (RED_LEFT_OF, [], {"dog": DOG_RIGHT, "cat": boxes("blue")}, 0, [1, 1, 0]),
    "place and colour, none found": (RED_LEFT_OF, [], {"dog": DOG_RIGHT}, 0, [1, 0, 0]),
    "chain, right": (
        CHAIN, [], {"dog": CAT_FAR, "cat": DOG_RIGHT, "cow": boxes(None, at=TOP)}, 1, [1, 1, 1, 1, 1],
    ),
    "chain, first link wrong": (
        CHAIN, [], {"dog": CAT_LEFT, "cat": DOG_RIGHT, "cow": boxes(None, at=TOP)}, 0, [1, 1, 0, 1, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_strict_and_soft_rules(case):
    include, exclude, found, strict, credits = CASES[case]
    metadata = {"tag": "x", "include": include, "exclude": exclude}
    assert geneval.strict(found, metadata) == strict
    assert geneval.soft(found, metadata) == pytest.approx(sum(credits) / len(credits))


def test_select_takes_the_most_confident_above_the_threshold():
    box = (0, 0, 5, 5)
    objects = [(0, 0.3, "a", 0), (0, 0.31, "b", 1), (0, 0.95, "c", 2), (16, 0.9, "d", 3), (16, 0.5, "e", 4)]
    assert geneval.select(objects, 0.3) == {"person": [("c", 2), ("b", 1)], "dog": [("d", 3), ("e", 4)]}
    assert geneval.select(objects, 0.9) == {"person": [("c", 2)]}  # 0.9 itself is not above it
    assert geneval.select([], 0.3) == {}
    # no suppression of the same box found twice, and sixteen at most
    assert len(geneval.select([(0, 0.5, box, None)] * 2, 0.3)["person"]) == 2
    many = [(0, 0.4 + i / 100, i, None) for i in range(20)] + [(2, 0.5, box, None)]
    found = geneval.select(many, 0.3)
    assert [number for number, _ in found["person"]] == list(range(19, 3, -1)) and len(found["car"]) == 1


def test_renamed_classes_keep_their_place_in_coco():
    assert [CLASSES[i] for i in (0, 62, 64, 65, 66, 67, 79)] == [
        "person", "tv", "computer mouse", "tv remote", "computer keyboard", "cell phone", "toothbrush",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Detector output to objects


@pytest.mark.parametrize(
    "size, expected",
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((480, 640), (800, 1067)),
        ((576, 1024), (750, 1333)),  # the long side decides
        ((2000, 100), (1333, 67)),
    ],
)
def test_edges(size, expected):
    assert geneval.edges(*size) == expected and geneval.edges(*size[::-1]) == expected[::-1]


def bilinear(before, after):
    """The matrix [after, before] of linear interpolation between pixel centres, clamped at the ends."""
    weights = np.zeros((after, before))
    for i in range(after):
        x = min(max((i + 0.5) * before / after - 0.5, 0), before - 1)
        low = min(int(x), before - 2) if before > 1 else 0
        weights[i, low] += 1 - (x - low)
        weights[i, min(low + 1, before - 1)] += x - low
    return weights


def resample(mask, resized, size):
    """A mask of a quarter of the padded input, at the resolution of the picture."""
    large = bilinear(len(mask), 4 * len(mask)) @ mask @ bilinear(mask.shape[1], 4 * mask.shape[1]).T
    cut = large[: resized[0], : resized[1]]
    return bilinear(resized[0], size[0]) @ cut @ bilinear(resized[1], size[1]).T


def objects_of(class_logits, mask_logits, wanted, threshold, resized, size):
    """What `instances` promises, spelt out in numpy."""
    prob = np.exp(class_logits - class_logits.max(1, keepdims=True))
    prob = (prob / prob.sum(1, keepdims=True))[:, :-1]
    ranked = sorted(((p, q, k) for (q, k), p in np.ndenumerate(prob)), reverse=True)[:100]
    objects = []
    for p, q, k in ranked:
        logits = resample(mask_logits[q], resized, size)
        mask = logits > 0
        if p > threshold and k in wanted and mask.any():
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            objects.append((k, p * (1 / (1 + np.exp(-logits[mask]))).mean(), box, mask))
    return objects


@pytest.mark.parametrize(
    "padded, resized, size",
    [((64, 64), (64, 64), (64, 64)), ((64, 96), (64, 70), (91, 100)), ((96, 64), (81, 64), (24, 19))],
)
def test_instances_equal_the_definition(padded, resized, size):
    rng = np.random.default_rng(0)
    class_logits, coarse = rng.normal(size=(30, 81)), rng.normal(size=(30, 3, 3)) - 0.5
    class_logits[np.arange(30), rng.integers(0, 81, 30)] += 6
    masks = np.stack([bilinear(3, padded[0] // 4) @ mask @ bilinear(3, padded[1] // 4).T for mask in coarse]) * 3
    wanted = set(range(0, 80, 2))
    expected = objects_of(class_logits, masks, wanted, 0.3, resized, size)
    got = geneval.instances(torch.tensor(class_logits), torch.tensor(masks), wanted, 0.3, resized, size)
    assert len(got) == len(expected) > 5
    for (label, confidence, box, mask), (k, c, b, m) in zip(got, expected):
        assert label == k and mask.shape == size and mask.dtype == bool
        assert abs(confidence - c) < 1e-5 and box == b and (mask != m).sum() == 0


def test_instances_of_a_rectangle():
    logits = torch.full((3, 8, 8), -2.0)
    logits[0, 2:5, 3:7] = 2.0  # of 32 x 32 pixels: rows 8 to 20, columns 12 to 28
    logits[1], logits[2] = 1.0, -1.0
    classes = torch.full((3, 81), -30.0)
    classes[0, 7], classes[1, 80], classes[2, 7] = 30, 30, 30  # the second is no object, the third has no pixel
    ((label, confidence, box, mask),) = geneval.instances(classes, logits, {7}, 0.3, (32, 32), (32, 32))
    inside = mask[8:20, 12:28]
    assert label == 7 and box == (12, 8, 28, 20) and mask.sum() == inside.sum()
    assert inside.sum() == inside.size - 4 * 1  # interpolation takes the corners off
    assert 0.5 < confidence < torch.tensor(2.0).sigmoid()
    assert geneval.instances(classes, logits, {8}, 0.3, (32, 32), (32, 32)) == []
    full = geneval.instances(classes[:1], torch.full((1, 8, 8), 3.0), {7}, 0.3, (25, 32), (50, 64))
    assert full[0][2] == (0, 0, 64, 50) and full[0][1] == pytest.approx(1 / (1 + math.exp(-3)))


def test_instances_are_out_of_the_best_hundred_pairs():
    classes = torch.zeros(120, 81)
    classes[:, 4] = torch.linspace(20, 32, 120)  # 120 sure queries of one class
    got = geneval.instances(classes, torch.ones(120, 2, 2), {4}, 0.3, (8, 8), (8, 8))
    assert len(got) == 100 and len(geneval.select(got, 0.3)["airplane"]) == 16


def test_cut_out_puts_the_object_on_grey():
    image = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2], mask[2, 4] = True, True
    got = geneval.cut_out(image, (2, 1, 5, 3), mask)
    grey = [153, 153, 153]
    expected = [[image[1, 2].tolist(), grey, grey], [image[2, 2].tolist(), grey, image[2, 4].tolist()]]
    assert got.dtype == np.uint8 and got.tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# The whole, on a tiny Mask2Former and a tiny CLIP with random weights in the real folder format


@torch.no_grad()
def draw(model):
    """Weights by their names: those of a seed depend on the order in which a version of the library draws them."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith(("bias", "embedding")):
            values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=weight.shape)
            weight.copy_(torch.tensor(values * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz-"]
    specials = ["<|startoftext|>", "<|endoftext|>"]  # no merges: to train them breaks ties by chance
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(specials + letters)}, merges=[])
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    bos, eos = tokenizer.convert_tokens_to_ids(specials)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, **sizes}
    vision = {"image_size": SIZE, "patch_size": 14, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    draw(model)
    with torch.no_grad():  # so that it sees colours
        for weight in model.parameters():
            weight.mul_(2 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE, "resample": 3}
    processor |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    sizes |= {"encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=20, num_labels=80, **sizes)
    with pytest.MonkeyPatch.context() as patch:  # its training loss, which is not used, insists on scipy
        patch.setattr("transformers.models.mask2former.modeling_mask2former.requires_backends", lambda *args: None)
        model = Mask2FormerForUniversalSegmentation(config).eval()
    draw(model)
    # Larger weights make its detections differ, some of them sure and some not.
    with torch.no_grad():
        model.model.transformer_module.queries_embedder.weight.mul_(4)
        model.model.transformer_module.queries_features.weight.mul_(4)
        model.model.pixel_level_module.decoder.mask_projection.weight.mul_(4)
        model.model.pixel_level_module.decoder.mask_projection.bias.zero_()
        model.class_predictor.weight.mul_(5)
    model.save_pretrained(folder)
    return folder, model


def load(detector, clip):
    return geneval.load("cpu", detector=detector, clip=clip, short_edge=SHORT, long_edge=LONG)


@pytest.fixture(scope="module")
def score(detector, clip):
    return load(detector[0], clip[0])


def detections(model, image, threshold):
    """{class: [(confidence, box, mask)]} by the processor and the model of the library and the definition above."""
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": SHORT, "longest_edge": LONG}, size_divisor=1)
    pixels = processor(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    resized = tuple(pixels.shape[-2:])
    pixels = F.pad(pixels, (0, -resized[1] % 32, 0, -resized[0] % 32))
    with torch.no_grad():
        out = model(pixel_values=pixels)
    classes, masks = out.class_queries_logits[0].numpy(), out.masks_queries_logits[0].numpy()
    found = {}
    for label, confidence, box, mask in objects_of(classes, masks, range(80), threshold, resized, image.shape[:2]):
        if confidence > threshold:
            found.setdefault(CLASSES[label], []).append((confidence, box, mask))
    return {name: sorted(group, key=lambda o: -o[0]) for name, group in found.items()}


def colour_of(clip, image, box, mask, name):
    """The official classifier, one object at a time, through CLIPModel's own forward."""
    _, model, tokenizer = clip
    on_grey = Image.composite(
        Image.fromarray(image), Image.new("RGB", image.shape[1::-1], "#999"), Image.fromarray(mask)
    )
    crop = on_grey.crop(tuple(int(edge) for edge in box))
    width, height = crop.size
    new = (SIZE, int(SIZE * height / width)) if width < height else (int(SIZE * width / height), SIZE)
    x = np.asarray(crop.resize(new, Image.Resampling.BICUBIC)) / 255.0
    top, left = (new[1] - SIZE) // 2, (new[0] - SIZE) // 2
    x = (x[top : top + SIZE, left : left + SIZE] - [0.48, 0.46, 0.41]) / [0.27, 0.26, 0.28]
    pixels = torch.tensor(x).float().permute(2, 0, 1)[None]
    cosines = []
    for color in COLORS:
        texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
        tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokens, pixel_values=pixels)  # embeddings of unit length
        mean = out.text_embeds.mean(0)
        cosines.append((mean / mean.norm() * out.image_embeds[0]).sum().item())
    return COLORS[int(np.argmax(cosines))]


SIZES = [(64, 64), (48, 72), (64, 96), (33, 71), (90, 31), (130, 100), (20, 20)]  # H, W


@pytest.fixture(scope="module")
def seen(detector):
    """Pictures and, by the reference, what the tiny detector sees in them."""
    images = [picture(i, *size) for i, size in enumerate(SIZES)]
    return images, [detections(detector[1], image, 0.3) for image in images]


def items_for(found, sure):
    """Metadata dicts of all tasks about what is in a picture, and what is not."""
    names = sorted(found, key=lambda name: -len(found[name]))
    a, b, count = names[0], names[1], len(found[names[0]])
    absent = next(name for name in CLASSES if name not in found)
    items = [("single_object", [want(a)]), ("two_object", [want(a), want(b)]), ("single_object", [want(absent)])]
    items += [("colors", [want(names[-1], color=color)]) for color in COLORS]
    items += [("color_attr", [want(a, count, color="white"), want(b, len(found[b]), color="green")])]
    alone = [(name, group[0][1]) for name, group in found.items() if len(group) == 1]
    places = [(x, y, r) for x, b in alone for y, a in alone if x != y for r in geneval.relations(a, b)][:1]
    for x, y, right in places or [(names[-1], names[-2], "above")]:
        items += [("position", [want(x), want(y, position=[r, 0])]) for r in ("left of", "above", right)]
    items = [{"tag": tag, "include": include} for tag, include in items]
    for name in [*sure, a]:
        number = max(1, len(sure.get(name, [])))
        items.append({"tag": "counting", "include": [want(name, number)], "exclude": [want(name, number + 1)]})
    return items


def test_the_whole_equals_a_reference(detector, clip, seen, score):
    images, metadata, expected, colours = [], [], [], set()
    for image, found in zip(*seen):
        sure = detections(detector[1], image, 0.9)
        for item in items_for(found, sure):
            wanted = {clause["class"] for clause in item["include"]}
            objects = sure if item["tag"] == "counting" else found
            named = {
                name: [
                    (box, colour_of(clip, image, box, mask, name) if "color" in item["include"][0] else None)
                    for _, box, mask in objects.get(name, [])
                ]
                for name in wanted
            }
            colours |= {colour for group in named.values() for _, colour in group}
            images.append(image)
            metadata.append(item)
            expected.append((geneval.soft(named, item), geneval.strict(named, item)))
    prompts = [""] * len(images)
    soft, strict = score({"image": images}, prompts, metadata), score.strict({"image": images}, prompts, metadata)
    expected = torch.tensor(expected)
    torch.testing.assert_close(soft, expected[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(strict, expected[:, 1], atol=0, rtol=0)
    assert soft.dtype == strict.dtype == torch.float32 and soft.shape == strict.shape == (len(images),)
    # The comparison means something: there are all kinds of results, and not one colour only.
    results = {}
    for item, credit in zip(metadata, expected[:, 0].tolist()):
        results.setdefault(item["tag"], set()).add(credit)
    assert all(len(results[tag]) > 1 for tag in ("colors", "color_attr", "counting", "position"))
    assert len(colours - {None}) > 4 and len(set(expected[:, 0].tolist())) > 5


def test_objects_equal_a_reference(detector, seen):
    find = geneval._load_detector(detector[0], "cpu", SHORT, LONG)
    for image, expected in zip(*seen):
        (found,) = find([image], [{"tag": "colors", "include": [want(name) for name in CLASSES]}])
        assert found.keys() == expected.keys() and len(found) > 2
        for name in found:
            assert [box for box, _ in found[name]] == [tuple(box) for _, box, _ in expected[name]][:16]
            for (_, mask), (_, _, other) in zip(found[name], expected[name]):
                assert (mask != other).mean() < 0.002  # pixels where the logit is 0 up to rounding


def test_colours_of_small_and_thin_objects(clip):
    """A crop of 3 x 12 pixels must not be taken for one of three channels."""
    name_colours = geneval._load_colours(clip[0], "cpu")
    found, images, expected = [], [], []
    for i, (height, width) in enumerate([(1, 1), (1, 12), (3, 12), (12, 3), (3, 3), (4, 3), (30, 2)] * 4):
        images.append(picture(i, 40, 40))
        mask = np.zeros((40, 40), bool)
        mask[5 : 5 + height, 7 : 7 + width] = True
        box = (7, 5, 7 + width, 5 + height)
        found.append({"dog": [(box, mask)]})
        expected.append({"dog": [(box, colour_of(clip, images[-1], box, mask, "dog"))]})
    metadata = [{"tag": "colors", "include": [want("dog", color="red")]}] * len(images)
    assert name_colours(images, found, metadata) == expected
    assert len({group["dog"][0][1] for group in expected}) > 2


def test_does_not_depend_on_the_batch(seen, score):
    images, metadata = [], []
    for image, found in zip(*seen):
        for item in items_for(found, {})[:6]:
            images.append(image)
            metadata.append(item)
    prompts, total = ["x"] * len(images), len(images)
    for form in (score, score.strict):
        got = form({"image": images}, prompts, metadata)
        single = torch.cat([form({"image": [i]}, ["x"], [m]) for i, m in zip(images, metadata)])
        torch.testing.assert_close(got, single, atol=1e-5, rtol=0)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = form({"image": [images[i] for i in order]}, prompts, [metadata[i] for i in order])
        torch.testing.assert_close(shuffled, got[order], atol=1e-5, rtol=0)
    assert got.unique().numel() == 2 and score({"image": []}, [], []).shape == (0,)


def test_png_equals_array(seen, score):
    decoded = []
    for image in seen[0]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        decoded.append(np.array(Image.open(file)))
    metadata = [items_for(found, {})[1] for found in seen[1]]
    prompts = [""] * len(metadata)
    got = score({"image": decoded}, prompts, metadata)
    torch.testing.assert_close(got, score({"image": seen[0]}, prompts, metadata), atol=0, rtol=0)


def test_failed_pictures_are_nan(seen, score):
    image, item = seen[0][0], items_for(seen[1][0], {})[3]  # an object that is there once, and its colour
    good = score({"image": [image]}, [""], [item])[0]
    bad = [None, image.astype(np.float32), image[..., 0], np.dstack([image, image[..., :1]]), image[:0]]
    got = score({"image": [*bad, image]}, [""] * 6, [item] * 6)
    assert got[:5].isnan().all() and got[5] == good >= 0.5
    assert score.strict({"image": [None, image]}, [""] * 2, [item] * 2).isnan().tolist() == [True, False]


def test_broken_models_are_nan_and_not_zero(detector, clip, seen, tmp_path):
    state = {name: weight.clone() for name, weight in detector[1].state_dict().items()}
    state["class_predictor.bias"][3] = math.nan
    detector[1].save_pretrained(tmp_path / "detector", state_dict=state)
    image, item = seen[0][0], items_for(seen[1][0], {})
    broken = load(tmp_path / "detector", clip[0])
    assert broken({"image": [image]}, [""], item[:1]).isnan().all()

    other = CLIPModel(clip[1].config)
    other.load_state_dict(clip[1].state_dict())
    with torch.no_grad():
        other.visual_projection.weight.fill_(math.nan)
    for file in clip[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other.save_pretrained(tmp_path)
    got = load(detector[0], tmp_path)({"image": [image] * 3}, [""] * 3, item[2:5])
    assert got.isnan().tolist() == [False, True, True]  # colours are NaN, an object that is not there is 0


def test_metadata_that_is_wrong_is_named(seen, score):
    image, right = seen[0][0], {"tag": "colors", "include": [want("dog", color="red")]}
    for wrong, why in [
        ({}, "expected a 'tag'"),
        (None, "expected a dict"),
        ({"tag": "colors", "include": [want("dg")]}, "expected a class of GenEval.*'dg'"),
        ({"tag": "colors", "include": [want("dog", color="gold")]}, "expected a color out of red, .*'gold'"),
    ]:
        with pytest.raises(ValueError, match=r"geneval, prompt 1 \('a gold dog'\): " + why):
            score({"image": [image] * 2}, ["a red dog", "a gold dog"], [right, wrong])
    with pytest.raises(ValueError, match="2 pictures for 1 prompts and 2 metadata dicts"):
        score({"image": [image] * 2}, [""], [right] * 2)


def test_hub_format_of_2022_loads_and_a_torn_file_does_not(detector, clip, seen, score, tmp_path):
    """The hub's main branch has pytorch_model.bin and no safetensors, with the names of its time (which the library
    still writes) and with buffers that are computed by now."""
    (tmp_path / "config.json").write_text((detector[0] / "config.json").read_text())
    state = load_file(detector[0] / "model.safetensors")
    for name, buffer in detector[1].named_buffers():
        if "relative_position_index" in name:
            state[name.replace("swin.", "").replace("relative_position_bias.", "self.")] = buffer
    old = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self."
    assert {old + "query.weight", old + "relative_position_index", "criterion.empty_weight"} <= set(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    args = {"image": seen[0]}, [""] * len(SIZES), [items_for(found, {})[1] for found in seen[1]]
    torch.testing.assert_close(load(tmp_path, clip[0])(*args), score(*args), atol=0, rtol=0)

    del state["class_predictor.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="1 weights are missing, like class_predictor.weight"):
        load(tmp_path, clip[0])
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(RuntimeError, match=f"geneval: cannot load {tmp_path}: ") as error:
        load(tmp_path, clip[0])
    assert "\n" not in str(error.value) and error.value.__suppress_context__


def test_detector_of_other_classes_and_clip_without_tokenizer_are_refused(detector, clip, tmp_path):
    config = json.loads((detector[0] / "config.json").read_text())
    names = {str(i): f"thing {i}" for i in range(80)}
    state = detector[1].state_dict()
    for count, why in [(80, None), (79, "it knows 79 classes, not the 80 of COCO")]:
        labels = dict(list(names.items())[:count])
        config |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        head = {name: state[name][: count + 1] for name in ("class_predictor.weight", "class_predictor.bias")}
        torch.save(state | head, tmp_path / "pytorch_model.bin")
        if why:
            with pytest.raises(RuntimeError, match=why):
                load(tmp_path, clip[0])
        else:
            load(tmp_path, clip[0])  # whatever the classes are called
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).write_bytes((clip[0] / name).read_bytes())
    with pytest.raises(RuntimeError, match="tokenizer of .* tokens, text model of"):
        load(detector[0], folder)


def test_offline_says_what_to_download(detector, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing cached
    for kwargs, name in [({}, geneval.DETECTOR), ({"detector": detector[0]}, geneval.CLIP)]:
        with pytest.raises(RuntimeError) as error:
            geneval.load(**kwargs)
        message = str(error.value)
        assert f"geneval: cannot load {name}" in message and f"hf download {name} --include" in message
        assert len(message.splitlines()) == 2 and error.value.__suppress_context__


def test_real_weights_see_no_dog_in_a_white_picture():
    try:
        score = geneval.load()
    except RuntimeError:
        pytest.skip(f"needs {geneval.DETECTOR} and {geneval.CLIP}")
    blank = np.full((256, 256, 3), 255, np.uint8)
    metadata = [{"tag": "colors", "include": [want("dog", color="red")]}]
    assert score({"image": [blank]}, ["a photo of a red dog"], metadata).tolist() == [0.0]
