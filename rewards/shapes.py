"""Verifier of the shapes world (data/shapes.py): does a picture show exactly what its metadata asks for?

It looks at the pixels only. Ink = 1 - min(r, g, b) / 255 is the share of a pixel that is covered (0 on white).
Connected pixels with ink are one object, whatever their colours: objects that touch are one object, and a bad one. Its
class is the ideal shape of the same area and centre that overlaps it best, its colour what is left after the white of
its soft edges is unmixed.

    strict  0 or 1: exactly these objects in these places, and nothing else
    soft    (mean + worst) / 2 of the credits of the wanted objects, times a factor <= 1 for each kind of fault:
            surplus objects, wrong places, stray ink

N wanted objects and one more: (N / (N + 1))^2. So k guesses at one object earn less than one guess, 1 / k of it, and
covering the picture with objects does not pay. The position rule is GenEval's
(arXiv 2310.11513; `box_offset` in data/shapes.py).
"""

import numpy as np
import torch

from data.shapes import CLASSES, COLORS, RELATIONS, SIZE, box_offset

# Areas are in pixels of a 32 x 32 picture and scale with it.
INK = 0.3  # pixels with more are part of an object
FAINT = 0.15  # ink below this is noise on the background; sigma 6 / 255 stays under it
SPECK = 2.5  # components of less area are not objects; their ink still counts as stray
SMALL = 20.0  # objects of less area are too small to have a shape (the smallest that is drawn has 32) ...
LARGE = 256.0, 512.0  # ... and from 16 x 16 on they turn into the background
MAX_STRAY = 3.0  # total ink outside of objects that strict lets pass
MIN_CLASS, MIN_COLOR = 0.6, 0.75  # least quality of a known class (an overlap of about 0.8) and colour

_PALETTE = np.array(list(COLORS.values()), np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels to objects


def _components(mask):
    """Labels of the 8-connected components of each picture: bool [B, H, W] -> int32 [B, H, W], 0 = background."""
    label = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), 0)
    while True:
        new = np.pad(label, ((0, 0), (1, 1), (1, 1)))
        new = np.maximum(np.maximum(new[:, :-2], new[:, 1:-1]), new[:, 2:])
        new = np.maximum(np.maximum(new[:, :, :-2], new[:, :, 1:-1]), new[:, :, 2:]) * mask
        # A label is the 1-based index of a pixel of its component: following it doubles the reach of every round.
        new = np.where(mask, new.ravel()[np.maximum(new, 1) - 1], 0)
        if (new == label).all():
            return label
        label = new


def _sharpen(cover):
    """Takes cover 0.25 .. 0.75 to 0 .. 1: the outline (0.5) stays in place, most of noise and blur goes."""
    return np.clip(2 * cover - 0.5, 0, 1)


def _ideal(name, x, y, area):
    """Sharpened cover of the ideal shape of that area centred on the origin, at the pixel offsets x, y."""
    if name == "circle":
        inside = np.sqrt(area / np.pi) - np.sqrt(x**2 + y**2)
    elif name == "square":
        half = np.sqrt(area) / 2 + 0.5
        return _sharpen(np.clip(half - np.abs(x), 0, 1) * np.clip(half - np.abs(y), 0, 1))
    elif name == "diamond":  # not a class: it competes with the circle, which it overlaps by 0.85
        inside = (np.sqrt(area / 2) - np.abs(x) - np.abs(y)) / np.sqrt(np.float32(2))
    else:  # triangle, as high as wide; the centroid is a third of the height above the base
        height = np.sqrt(2 * area)
        side = (y + height * 2 / 3 - 2 * np.abs(x)) / np.sqrt(np.float32(5))
        inside = np.minimum(side, height / 3 - y)
    return _sharpen(np.clip(inside + 0.5, 0, 1))  # cover of a pixel = signed distance of its centre, to first order


def _analyse(images):
    """uint8 [B, H, W, 3] -> (list of B lists of objects, stray ink [B])."""
    block = max(1, min(images.shape[1:3]) // SIZE)  # larger pictures are averaged down to 32 .. 63 pixels: same result
    pad = [-n % block for n in images.shape[1:3]]
    pixels = np.pad(images, ((0, 0), (0, pad[0]), (0, pad[1]), (0, 0)), mode="edge").astype(np.float32)
    count, rows, columns = len(pixels), pixels.shape[1] // block, pixels.shape[2] // block
    pixels = pixels.reshape(count, rows, block, columns, block, 3).mean((2, 4)) if block > 1 else pixels
    unit = (min(images.shape[1:3]) / block / SIZE) ** 2  # pixels here per pixel of a 32 x 32 picture

    ink = 1 - pixels.min(-1) / 255
    cover = _sharpen(ink)
    label = _components(ink > INK)
    b, i, j = np.nonzero(label)
    _, first, k = np.unique(label[b, i, j], return_index=True, return_inverse=True)  # k: the object of each pixel
    picture, n = b[first], len(first)  # np.unique sorts by label and labels grow with the picture: objects do too
    weight = cover[b, i, j] + 1e-6

    def total(values):
        return np.bincount(k, values, n)

    area = total(weight)
    cx, cy = total(weight * (j + 0.5)) / area, total(weight * (i + 0.5)) / area
    box = np.empty((n, 4))
    for column, (index, extreme, start) in enumerate(
        ((j, np.minimum, np.inf), (i, np.minimum, np.inf), (j + 1, np.maximum, 0), (i + 1, np.maximum, 0))
    ):
        box[:, column] = start
        extreme.at(box[:, column], k, index)

    # Colour: unmix the white, then 1 within 15 of a palette colour and 0 from 165 on (two palette colours are > 180
    # apart), averaged over the pixels: an object of two colours has neither.
    own = 255 - (255 - pixels[b, i, j]) / ink[b, i, j, None]
    colors = np.stack(
        [total(weight * np.clip(1.1 - np.sqrt(((own - c) ** 2).sum(-1)) / 150, 0, 1)) / area for c in _PALETTE], -1
    )

    # Class: overlap (intersection over union of the covers) with each ideal shape.
    size = np.clip(np.minimum(area / unit / SMALL, (LARGE[1] - area / unit) / (LARGE[1] - LARGE[0])), 0, 1)
    overlap = np.zeros((n, len(CLASSES) + 1))
    judged = np.flatnonzero((size > 0) & (area / unit > SPECK))
    reach = int(np.ceil(SIZE / 2 * np.sqrt(unit)))  # what lies farther out counts in the union, as part of the area
    padded = np.pad(label, ((0, 0), (reach, reach), (reach, reach)))
    padded_cover = np.pad(cover, ((0, 0), (reach, reach), (reach, reach)))
    window = np.arange(-reach, reach)
    for part in np.array_split(judged, len(judged) // 256 + 1):
        center_i, center_j = cy[part].astype(int), cx[part].astype(int)
        at = (
            picture[part, None, None],
            (center_i[:, None] + window + reach)[:, :, None],
            (center_j[:, None] + window + reach)[:, None, :],
        )
        mine = padded_cover[at] * (padded[at] == label[b[first[part]], i[first[part]], j[first[part]]][:, None, None])
        y = (center_i[:, None] + window + 0.5 - cy[part, None]).astype(np.float32)[:, :, None]
        x = (center_j[:, None] + window + 0.5 - cx[part, None]).astype(np.float32)[:, None, :]
        a = area[part].astype(np.float32)
        for c, name in enumerate((*CLASSES, "diamond")):
            ideal = _ideal(name, x, y, a[:, None, None])
            both = np.minimum(mine, ideal).sum((1, 2))
            overlap[part, c] = both / (a + ideal.sum((1, 2)) - both)
    # A circle and a square of one area overlap by 0.83, so the overlap alone says little: the softmax tells which shape
    # it is, the rescaled overlap how good it is.
    which = np.exp((overlap - overlap.max(-1, keepdims=True)) / 0.04)
    which = (which / which.sum(-1, keepdims=True))[:, : len(CLASSES)]
    fit = np.clip((overlap[:, : len(CLASSES)] - 0.6) / 0.3, 0, 1) * size[:, None]
    classes = fit * which

    objects = [[] for _ in range(count)]
    for o in np.flatnonzero(area / unit > SPECK):
        c, d = classes[o].argmax(), colors[o].argmax()
        objects[picture[o]].append(
            {
                "class": CLASSES[c] if classes[o, c] >= MIN_CLASS else "unknown",
                "class_quality": float(classes[o, c]),
                "color": list(COLORS)[d] if colors[o, d] >= MIN_COLOR else "unknown",
                "color_quality": float(colors[o, d]),
                "center": (float(cx[o]) * block, float(cy[o]) * block),
                "box": tuple((box[o] * block).tolist()),
                "area": float(area[o]) * block**2,
                "classes": dict(zip(CLASSES, classes[o].tolist())),
                "colors": dict(zip(COLORS, colors[o].tolist())),
                "fit": float(fit[o].max()),
                "size": float(min(area[o] / unit / SMALL, 1)),
            }
        )

    # Stray ink: all that is neither in an object nor the soft edge of one, two pixels wide.
    near = np.pad(np.isin(label, label[b[first], i[first], j[first]][area / unit > SPECK]), ((0, 0), (2, 2), (2, 2)))
    near = np.any([near[:, t : t + rows] for t in range(5)], 0)
    near = np.any([near[:, :, t : t + columns] for t in range(5)], 0)
    return objects, (np.clip(ink - FAINT, 0, None) * ~near).sum((1, 2)) / (1 - FAINT) / unit


def analyse(image):
    """The objects of one picture, uint8 [H, W, 3], as dicts: `class` and `color` ("unknown" where too bad), their
    qualities 0 .. 1, `center` (x, y), `box` (x0, y0, x1, y1) and `area` in pixels; `classes` and `colors` hold the
    quality for each candidate, `fit` how much it is any of the shapes, `size` 0 .. 1 how far it is from a speck."""
    return _analyse(np.asarray(image)[None])[0][0]


# ----------------------------------------------------------------------------------------------------------------------
# Objects to scores


def _wanted(metadata):
    """[(include index, item)], one for each object asked for. ValueError if that is not a scene of the shapes world."""

    def fail(key, expected):
        prompt = metadata.get("prompt") if isinstance(metadata, dict) else None
        raise ValueError(f"shapes reward, prompt {prompt!r}: {key}: expected {expected} (prompts of data/shapes.py)")

    include = metadata.get("include") if isinstance(metadata, dict) else None
    if not isinstance(include, list) or not include:
        fail("metadata 'include'", f"a list of wanted objects, got {include!r}")
    for item in include:
        name, count, color, position = (item.get(key) for key in ("class", "count", "color", "position"))
        if name not in CLASSES:
            fail("'class'", f"one of {', '.join(CLASSES)}, got {name!r}")
        if not isinstance(count, int) or count < 1:
            fail("'count'", f"a whole number from 1 on, got {count!r}")
        if color is not None and color not in COLORS:
            fail("'color'", f"one of {', '.join(COLORS)}, got {color!r}")
        if position is not None and not (
            len(position) == 2 and position[0] in RELATIONS and position[1] in range(len(include))
        ):
            fail("'position'", f"[{' | '.join(RELATIONS)}, index into include], got {position!r}")
    return [(g, item) for g, item in enumerate(include) for _ in range(item["count"])]


def _credit(found, item):
    """What a found object is worth as a wanted one: 1 if right, 0.1 if a shape of another class and colour."""
    if "color" not in item:
        return found["fit"] * (0.1 + 0.9 * found["classes"][item["class"]] / max(found["fit"], 1e-6))
    right, color = found["classes"][item["class"]] / max(found["fit"], 1e-6), found["colors"][item["color"]]
    return found["fit"] * (0.1 + 0.3 * right + 0.3 * color + 0.3 * right * color)


def _assign(credit):
    """The assignment of wanted to found objects with the largest total credit, exact: [W, F] -> list of found index or
    None for each wanted. Dynamic programming over the sets of served wanted objects: F * W * 2^W steps, W is 1 to 4."""
    wanted, found = len(credit), len(credit[0]) if credit else 0
    best = {0: (0.0, ())}  # set of served wanted objects, as bits -> (total, pairs)
    for f in range(found):
        for served, (value, pairs) in list(best.items()):
            for w in range(wanted):
                gain = value + credit[w][f]
                if not served >> w & 1 and gain > best.get(served | 1 << w, (-1.0,))[0]:
                    best[served | 1 << w] = (gain, (*pairs, (w, f)))
    pairs = dict(max(best.values(), key=lambda entry: entry[0])[1])
    return [pairs.get(w) for w in range(wanted)]


def _judge(found, stray, metadata):
    """(soft, strict) of the objects found in one picture."""
    wanted = _wanted(metadata)
    # A picture of noise can hold dozens of components: the largest are enough to find the wanted ones among them.
    by_size = sorted(found, key=lambda o: -o["area"])[: 2 * len(wanted) + 2]
    credit = [[_credit(o, item) for o in by_size] for _, item in wanted]
    match = [None if f is None else by_size[f] for f in _assign(credit)]
    credits = [0.0 if o is None else _credit(o, item) for o, (_, item) in zip(match, wanted)]

    strict = len(found) == len(wanted) and stray <= MAX_STRAY and None not in match
    strict = strict and all(o["class"] == item["class"] for o, (_, item) in zip(match, wanted))
    strict = strict and all(o["color"] == item.get("color", o["color"]) for o, (_, item) in zip(match, wanted))

    place = 1.0
    for g, item in enumerate(metadata["include"]):
        if item.get("position") is None:
            continue
        relation, target = item["position"]
        here = [o for o, (w, _) in zip(match, wanted) if w == g]
        there = [o for o, (w, _) in zip(match, wanted) if w == target]
        if None in here or None in there:
            toward = -1.0
        else:  # all pairs have to be in place: the worst one decides
            toward = min(box_offset(a["box"], b["box"]) @ RELATIONS[relation] for a in here for b in there)
        strict = strict and toward > 0.5
        place = min(place, 0.4 + 0.6 / (1 + np.exp(-15 * (toward - 0.5))))

    matched = {id(o) for o in match}
    surplus = sum(0.25 + 0.75 * o["size"] for o in found if id(o) not in matched)
    soft = (np.mean(credits) + min(credits)) / 2 * place
    soft *= (len(wanted) / (len(wanted) + surplus)) ** 2 / (1 + stray / 10)
    return float(np.clip(soft, 0, 1)), float(strict)


class Score:
    """`score(samples, prompts, metadata)` is the soft score, `score.strict(...)` the strict one: float tensors [B].

    samples["image"]: uint8 arrays [H, W, 3], any size. metadata: one dict per sample. ValueError if an item is not a
    scene of the shapes world. 0.2 ms a picture of 32 x 32 on one core, 0.5 ms if it is noise."""

    needs = ("image",)

    def __call__(self, samples, prompts, metadata):
        return self._scores(samples, metadata)[:, 0]

    def strict(self, samples, prompts, metadata):
        return self._scores(samples, metadata)[:, 1]

    def _scores(self, samples, metadata):
        images = samples["image"]
        if metadata is None or len(metadata) != len(images):
            got = "none" if metadata is None else len(metadata)
            raise ValueError(f"shapes reward: expected one metadata dict with 'include' per image, got {got}")
        images = [np.asarray(image) for image in images]
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"shapes reward: expected uint8 images [H, W, 3], got {image.dtype} {image.shape}")
        scores = torch.empty(len(images), 2)
        for shape in {image.shape for image in images}:
            rows = [k for k, image in enumerate(images) if image.shape == shape]
            at_once = max(1, 2**18 // (shape[0] * shape[1]))  # 256 pictures of 32 x 32: some 50 MB
            for part in (rows[k : k + at_once] for k in range(0, len(rows), at_once)):
                objects, stray = _analyse(np.stack([images[k] for k in part]))
                for k, found, ink in zip(part, objects, stray):
                    scores[k] = torch.tensor(_judge(found, ink, metadata[k]))
        return scores


def load(device=None):
    """The shapes reward. It runs on the CPU; `device` is there for the signature that all rewards share."""
    return Score()
