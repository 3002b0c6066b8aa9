"""GenEval (https://arxiv.org/abs/2310.11513): does a picture show the objects, counts, colours and places asked for?

A detector finds the objects, CLIP names their colours, rules compare them with the metadata (format: data/geneval.py).

    strict  0 or 1, the decision of the official evaluation: at least `count` objects of each included class, of which
            the most confident `count` have the colour and the position; fewer than `count` of an excluded one
    soft    the mean of credits, as in Flow-GRPO (arXiv 2505.05470). For each included class
                number    max(0, 1 - |found - count| / count), and another 0 if it is wrong and more was asked
                colour    share of the right colour, if the number is right
                position  0 or 1, if number and colour are right
            It wants exactly `count`, and so does not read `exclude`.

Flow-GRPO's own code differs from this in three bugs: a wrong position got half of its credit, credits of surplus
objects became negative, and the detector saw red and blue swapped.

The detector is Meta's Mask2Former and not the mmdet reproduction of it that the official evaluation pins: same
architecture and data, other weights, so that published scores are to be compared with care. It sees the picture with
its short side at 800 pixels: 13 s a picture on one CPU core, so use a GPU.
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.geneval import CLASSES, COLORS, check
from data.shapes import box_offset

BATCH_SIZE = 4  # pictures per forward of the detector; a call may have any number
DETECTOR = "facebook/mask2former-swin-small-coco-instance"  # 69 M parameters, 0.28 GB
CLIP = "openai/clip-vit-large-patch14"  # 428 M parameters, 1.7 GB

# Of the official evaluation, whose non-maximum suppression is off at its default (overlap 1.0): there is none here.
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # least confidence of an object
MAX_OBJECTS = 16  # per class, the most confident
TEMPLATES = "a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object"
GREY = 0x99  # what an object is cut out onto before its colour is named

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, for the detector


# ----------------------------------------------------------------------------------------------------------------------
# Rules


def relations(box_a, box_b):
    """Where A lies as seen from B: boxes (x0, y0, x1, y1) -> subset of {"left of", "right of", "above", "below"}."""
    dx, dy = box_offset(box_a, box_b)
    places = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, there in places.items() if there}


def strict(found, metadata):
    """1. or 0., the official decision. found: {class: [(box, colour or None), ...]}, the most confident first; colours
    are needed for the first `count` objects of the clauses that ask for one."""
    groups = []  # the objects that met each clause, or None
    for clause in metadata["include"]:
        objects = found.get(clause["class"], [])[: clause["count"]]
        right = len(objects) == clause["count"] and _right_colours(objects, clause) == clause["count"]
        groups.append(objects if right and _in_place(objects, clause, groups) else None)
    surplus = any(len(found.get(clause["class"], [])) >= clause["count"] for clause in metadata.get("exclude", []))
    return float(None not in groups and not surplus)


def soft(found, metadata):
    """The mean credit in [0, 1], as above; `found` as for strict."""
    credits, groups = [], []
    for clause in metadata["include"]:
        objects, count = found.get(clause["class"], []), clause["count"]
        credits.append(max(0.0, 1 - abs(len(objects) - count) / count))
        right = len(objects) == count
        if not right and ("color" in clause or "position" in clause):
            credits.append(0.0)
        if right and "color" in clause:
            credits.append(_right_colours(objects, clause) / count)
            right = credits[-1] == 1
        if right and "position" in clause:
            right = _in_place(objects, clause, groups)
            credits.append(float(right))
        groups.append(objects if right else None)
    return sum(credits) / len(credits)


def _right_colours(objects, clause):
    return sum(colour == clause.get("color", colour) for _, colour in objects)


def _in_place(objects, clause, groups):
    """Does every object stand in the relation to every one of the group it refers to?"""
    if "position" not in clause:
        return True
    relation, target = clause["position"]
    others = groups[target]
    return others is not None and all(relation in relations(a, b) for a, _ in objects for b, _ in others)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures to objects


def edges(height, width, short=800, long=1333):
    """The size the detector works at: short side `short`, or less if the long side would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def instances(class_logits_QK, mask_logits_QHW, wanted, threshold, resized, size):
    """Objects of one picture, from the detector's output for it: [(class index, confidence, box, mask), ...].

    class_logits_QK: Q queries, the last of the K classes is "no object". mask_logits_QHW: at a quarter of the
    resolution of the input, which is the picture at `resized` = (height, width), padded on the right and at the bottom.
    wanted: indices of the classes to return. box: ints (x0, y0, x1, y1), ends exclusive; mask: bool array [*size].

    As mmdet does it: the best 100 (query, class) pairs, of which the confidence is the probability of the class times
    the mean probability of the mask's pixels.
    """
    prob_QK = class_logits_QK.float().softmax(-1)[:, :-1]
    top = prob_QK.flatten().topk(min(100, prob_QK.numel()))
    num_classes, padded = prob_QK.shape[1], [4 * side for side in mask_logits_QHW.shape[1:]]
    objects = []
    for prob, index in zip(top.values.tolist(), top.indices.tolist()):
        query, label = divmod(index, num_classes)
        if prob <= threshold or label not in wanted:  # the mask can only lower it
            continue
        logits = F.interpolate(mask_logits_QHW[None, query : query + 1].float(), padded, mode="bilinear")
        logits = F.interpolate(logits[..., : resized[0], : resized[1]], size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        confidence = prob * logits[mask].sigmoid().mean().item()
        mask = mask.cpu().numpy()
        columns, rows = mask.any(0).nonzero()[0].tolist(), mask.any(1).nonzero()[0].tolist()
        objects.append((label, confidence, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), mask))
    return objects


def select(objects, threshold):
    """{class: [(box, mask), ...]} of the objects above the threshold, the most confident first, at most MAX_OBJECTS."""
    found = {}
    for label, confidence, box, mask in sorted(objects, key=lambda o: -o[1]):
        group = found.setdefault(CLASSES[label], []) if confidence > threshold else []
        if len(group) < MAX_OBJECTS:
            group.append((box, mask))
    return found


def cut_out(image, box, mask):
    """The object on grey, cut to its box: uint8 [y1 - y0, x1 - x0, 3]."""
    x0, y0, x1, y1 = box
    return np.where(mask[y0:y1, x0:x1, None], image[y0:y1, x0:x1], np.uint8(GREY))


# ----------------------------------------------------------------------------------------------------------------------
# Reward


def load(device="cpu", detector=DETECTOR, clip=CLIP, short_edge=800, long_edge=1333):
    """The soft score of samples["image"] under `metadata`, with the official decision as its strict form.

    detector, clip: hub ids or local folders; the detector's classes have to be COCO's 80 in their order, whatever they
    are called. The edges are the size the detector was trained for.
    A picture that is not uint8 [H, W, 3], or on which a model fails, is NaN; metadata that is not GenEval's is a
    ValueError. Raises RuntimeError if the models are neither local nor to be had from the hub.
    """
    find = _load_detector(detector, device, short_edge, long_edge)
    name_colours = _load_colours(clip, device)

    last = ([], [], None)

    def both(samples, prompts, metadata):
        # An evaluation asks for both forms of the same lists, one after the other; the detector is what costs.
        nonlocal last
        if last[0] is not samples["image"] or last[1] is not metadata:
            last = (samples["image"], metadata, judge(samples["image"], prompts, metadata))
        return last[2]

    def judge(images, prompts, metadata):
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"geneval: {len(images)} pictures for {len(prompts)} prompts and {len(metadata)} metadata dicts"
            )
        for i, item in enumerate(metadata):
            try:
                check(item)
            except ValueError as error:
                raise ValueError(f"geneval, prompt {i} ({prompts[i]!r}): {error}") from None
        reward_B2 = torch.full((len(images), 2), math.nan)
        shapes = {}  # pictures of one size make one batch
        for i, image in enumerate(images):
            if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
                shapes.setdefault(image.shape, []).append(i)
        for rows in shapes.values():
            for part in (rows[k : k + BATCH_SIZE] for k in range(0, len(rows), BATCH_SIZE)):
                pictures, items = [images[i] for i in part], [metadata[i] for i in part]
                found = name_colours(pictures, find(pictures, items), items)
                for i, objects, item in zip(part, found, items):
                    if objects is not None:
                        reward_B2[i] = torch.tensor([soft(objects, item), strict(objects, item)])
        return reward_B2

    def score(samples, prompts, metadata):
        return both(samples, prompts, metadata)[:, 0]

    def strict_score(samples, prompts, metadata):
        return both(samples, prompts, metadata)[:, 1]

    score.needs, score.strict = ("image",), strict_score
    return score


def _load_detector(name, device, short_edge, long_edge):
    from transformers import Mask2FormerModel, Mask2FormerPreTrainedModel  # seconds to import

    class Detector(Mask2FormerPreTrainedModel):
        """Mask2FormerForUniversalSegmentation without its training loss, which would need scipy."""

        _keys_to_ignore_on_load_unexpected = ["criterion.empty_weight"]

        def __init__(self, config):
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixel_values):
            out = self.model(pixel_values, output_hidden_states=True)
            states_QBD = out.transformer_decoder_intermediate_states[-1]
            return self.class_predictor(states_QBD.transpose(0, 1)), out.masks_queries_logits[-1]

    try:
        model, info = Detector.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise OSError(f"{len(info['missing_keys'])} weights are missing, like {min(info['missing_keys'])}")
        if model.config.num_labels != len(CLASSES):
            raise OSError(f"it knows {model.config.num_labels} classes, not the {len(CLASSES)} of COCO")
    except (OSError, RuntimeError) as error:
        _cannot_load(name, ["config.json", "pytorch_model.bin", "model.safetensors"], error)
    model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def find(pictures, metadata):
        """Per picture (all of one size) what `select` returns, or None where the model's output is not finite."""
        size = pictures[0].shape[:2]
        height, width = resized = edges(*size, short_edge, long_edge)
        pixels = torch.zeros(len(pictures), 3, -(-height // 32) * 32, -(-width // 32) * 32)
        for pixel, picture in zip(pixels, pictures):
            picture = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
            pixel[:, :height, :width] = ((torch.from_numpy(np.array(picture)) / 255 - MEAN) / STD).permute(2, 0, 1)
        found = []
        for labels, masks, item in zip(*model(pixels.to(device)), metadata):
            if not (labels.isfinite().all() and masks.isfinite().all()):
                found.append(None)
                continue
            wanted = {CLASSES.index(clause["class"]) for clause in item["include"] + item.get("exclude", [])}
            threshold = COUNTING_THRESHOLD if item["tag"] == "counting" else THRESHOLD
            found.append(select(instances(labels, masks, wanted, threshold, resized, size), threshold))
        return found

    return find


def _load_colours(name, device):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    try:
        preprocess = CLIPImageProcessorPil.from_pretrained(name)
        tokenizer = CLIPTokenizer.from_pretrained(name)
        model, info = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise OSError(f"{len(info['missing_keys'])} weights are missing, like {min(info['missing_keys'])}")
        # Where the tokenizer's files are missing, transformers 5 returns an empty vocabulary and no error.
        if len(tokenizer) != model.config.text_config.vocab_size:
            raise OSError(f"tokenizer of {len(tokenizer)} tokens, text model of {model.config.text_config.vocab_size}")
    except (OSError, RuntimeError) as error:
        _cannot_load(name, ["'*.json'", "merges.txt", "model.safetensors"], error)
    model = model.to(device).eval().requires_grad_(False)
    texts = {}  # class -> [10, D], unit length; filled when a class is first asked for

    def embed(name):
        prompts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        each = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        return F.normalize(each.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)

    @torch.no_grad()
    def name_colours(pictures, found, metadata):
        """`found` with colours in place of masks where a clause of the metadata asks for them, None elsewhere."""
        cuts, where = [], []
        for i, item in enumerate(metadata):
            for clause in item["include"] if found[i] is not None else []:
                objects = found[i].get(clause["class"], [])
                if "color" in clause and len(objects) >= clause["count"]:
                    cuts += [cut_out(pictures[i], box, mask) for box, mask in objects[: clause["count"]]]
                    where += [(i, clause["class"], k) for k in range(clause["count"])]
        named = [f and {name: [(box, None) for box, _ in group] for name, group in f.items()} for f in found]
        for start in range(0, len(cuts), 16):
            crops = cuts[start : start + 16]
            pixels = preprocess(images=crops, input_data_format="channels_last", return_tensors="pt").to(device)
            features = F.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
            for feature, (i, name, k) in zip(features, where[start:]):
                if name not in texts:
                    texts[name] = embed(name)
                cosines = texts[name] @ feature
                if not cosines.isfinite().all():
                    named[i] = None
                elif named[i] is not None:
                    named[i][name][k] = named[i][name][k][0], COLORS[cosines.argmax()]
        return named

    return name_colours


def _cannot_load(name, files, error):
    include = " ".join(f"--include {file}" for file in files)
    hint = "" if os.path.isdir(name) else f"\nDownload once, with a network: hf download {name} {include}"
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    raise RuntimeError(f"geneval: cannot load {name}: {reason}.{hint}") from None
