"""The shapes world: captioned pictures of circles, squares and triangles on white, drawn on the fly.

It needs no files and no network, and every caption can be checked exactly, so that reinforcement learning on it has a
verifiable reward (`rewards/shapes.py`). A scene is described by metadata in the form of GenEval (Ghosh et al.,
arXiv 2310.11513), its six tasks included:

    {"tag": "position",
     "include": [{"class": "square", "count": 1, "color": "blue"},
                 {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]}],
     "prompt": "a red circle left of a blue square"}

`color` is optional; `position` is a relation and the index in `include` of the object it refers to.

An edit is a picture, an instruction ("make the red circle blue"), the instruction that undoes it ("make the blue circle
red") and the metadata of the picture that should come out.
"""

import functools
import hashlib
import itertools

import numpy as np

SIZE = 32  # pixels; all lengths below are in pixels at this size and scale with the picture
CLASSES = ("circle", "square", "triangle")
# At least one channel of every colour is 0. So the ink of a pixel, 1 - min(r, g, b) / 255, is the exact share of it
# that an object covers, whatever its colour, and the colour can be unmixed from the white (rewards/shapes.py does).
COLORS = {
    "red": (230, 0, 0),
    "yellow": (255, 210, 0),
    "green": (0, 175, 50),
    "blue": (0, 40, 255),
    "purple": (160, 0, 180),
    "black": (0, 0, 0),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction (x, y), y down
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
EDIT_TAGS = ("recolor", "reshape", "remove", "add", "move")

HELD_OUT_SHARE = 0.2
WIDTHS = (8.0, 10.0, 12.0)  # of an object
LATTICE = 2.0  # objects lie on a lattice of this pitch: a model of half a million parameters learns it in minutes
BORDER = 2.0  # least distance of an object from the border
GAP = 3.0  # least distance between two objects: at least 2 pixels stay pure white between their soft outlines
POSITION_MARGIN = 0.7  # least offset in the direction asked for; GenEval asks for more than 0.5
MOVE_MARGIN = 0.3  # most offset there before an object is moved: what GenEval would let pass is no picture to edit
SUPERSAMPLING = 4  # sub-pixels per pixel and axis
CANDIDATES = 32  # places tried for an object before the whole layout starts again


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def _count_words(name, count, color):
    number = {1: "a", 2: "two", 3: "three", 4: "four"}[count]
    return " ".join(w for w in (number, color, name if count == 1 else name + "s") if w)


def _item(name, count=1, color=None, position=None):
    item = {"class": name, "count": count}
    if color is not None:
        item["color"] = color
    if position is not None:
        item["position"] = position
    return item


@functools.cache
def _split():
    """(train, held out) prompts, each in the order of `all_prompts`."""
    prompts = all_prompts()
    scenes = {tag: {} for tag in TAGS}  # tag -> scene -> its prompts: a scene told in another order is the same scene
    for m in prompts:
        things = [(item.get("color"), item["class"], item["count"]) for item in m["include"]]
        if m["tag"] == "position":
            relation = m["include"][1]["position"][0]
            first, second = (1, 0) if relation in ("left of", "above") else (0, 1)
            scene = ("horizontal" if relation in ("left of", "right of") else "vertical", things[first], things[second])
        else:
            scene = tuple(sorted(things, key=str))
        scenes[m["tag"]].setdefault(repr(scene), []).append(m["prompt"])
    held_out = set()
    for tag in TAGS:
        by_hash = sorted(scenes[tag], key=lambda scene: hashlib.sha256(scene.encode()).hexdigest())
        for scene in by_hash[: max(1, round(HELD_OUT_SHARE * len(by_hash)))]:
            held_out.update(scenes[tag][scene])
    return [m for m in prompts if m["prompt"] not in held_out], [m for m in prompts if m["prompt"] in held_out]


def all_prompts():
    """Metadata of every scene the vocabulary can tell, in a fixed order: a list of dicts."""
    out = []

    def add(tag, prompt, *include):
        out.append({"tag": tag, "include": list(include), "prompt": prompt})

    things = list(itertools.product(COLORS, CLASSES))
    for name in CLASSES:
        add("single_object", _count_words(name, 1, None), _item(name))
    for a, b in itertools.permutations(CLASSES, 2):
        add("two_object", f"a {a} and a {b}", _item(a), _item(b))
    for name, count, color in itertools.product(CLASSES, (2, 3, 4), (None, *COLORS)):
        add("counting", _count_words(name, count, color), _item(name, count, color))
    for color, name in things:
        add("colors", f"a {color} {name}", _item(name, 1, color))
    for (color_a, a), (color_b, b) in itertools.permutations(things, 2):
        for relation in RELATIONS:
            prompt = f"a {color_a} {a} {relation} a {color_b} {b}"
            add("position", prompt, _item(b, 1, color_b), _item(a, 1, color_a, [relation, 0]))
        if color_a != color_b and a != b:
            add("color_attr", f"a {color_a} {a} and a {color_b} {b}", _item(a, 1, color_a), _item(b, 1, color_b))
    return out


def train_prompts():
    """About 80 % of `all_prompts`, per tag. Scenes are split, not texts: "a red circle left of a blue square" and
    "a blue square right of a red circle" are on the same side. The split depends on nothing but the scenes."""
    return list(_split()[0])


def held_out_prompts():
    """The other 20 %, at least one scene per tag."""
    return list(_split()[1])


def _by_tag(prompts):
    groups = {}
    for m in prompts:
        groups.setdefault(m["tag"], []).append(m)
    return list(groups.values())


def _sample(groups, rng):
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


def sample_metadata(prompts, rng):
    """One of `prompts`: the tag uniformly first, so that tags with few prompts are seen as often as the others."""
    return _sample(_by_tag(prompts), rng)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def box_offset(box_a, box_b):
    """Where A lies as seen from B, by the rule of GenEval's evaluation: arrays [..., 4] (x0, y0, x1, y1) -> [..., 2].

    The offset of the centres, each component shrunk towards 0 by a tenth of the two extents, over the length of the
    unshrunk offset. A component beyond +-0.5 is a relation: x < -0.5 left of, x > 0.5 right of, y < -0.5 above,
    y > 0.5 below. Boxes with the same centre give 0.
    """
    box_a, box_b = np.asarray(box_a, float), np.asarray(box_b, float)
    offset = (box_a[..., :2] + box_a[..., 2:] - box_b[..., :2] - box_b[..., 2:]) / 2
    extent = box_a[..., 2:] - box_a[..., :2] + box_b[..., 2:] - box_b[..., :2]
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * extent, 0)
    return shrunk / np.maximum(np.sqrt((offset**2).sum(-1, keepdims=True)), 1e-12)


def _layout(groups, relations, rng):
    """Boxes [N, 4] at size 32 of N objects that keep their distances and relations; `groups` holds the include index
    of each object, `relations` triples (include index, relation, include index). ValueError if they seem not to fit."""
    for _ in range(1000):
        placed = np.empty((0, 4))
        for n, group in enumerate(groups):  # one by one, each at the first of a few places that suits those before it
            width = rng.choice(WIDTHS, (CANDIDATES, 1))
            places = (SIZE - 2 * BORDER - width) / LATTICE + 1
            corner = BORDER + LATTICE * np.floor(rng.random((CANDIDATES, 2)) * places)
            boxes = np.concatenate([corner, corner + width], 1)[:, None]  # [CANDIDATES, 1, 4] against placed [n, 4]
            gap = np.maximum(boxes[..., :2] - placed[:, 2:], placed[:, :2] - boxes[..., 2:]).max(-1)
            fits = (gap >= GAP).all(1)
            for a, relation, b in relations:
                for here, other, sign in ((a, b, 1), (b, a, -1)):
                    if group == here and (groups[:n] == other).any():
                        offset = box_offset(boxes, placed[groups[:n] == other]) @ np.array(RELATIONS[relation])
                        fits &= (sign * offset >= POSITION_MARGIN).all(1)
            if not fits.any():
                break
            placed = np.concatenate([placed, boxes[fits.argmax()]])
        else:
            return placed
    raise ValueError(f"{len(groups)} objects with relations {relations} do not fit into one picture: ask for fewer")


@functools.cache
def _subpixels(size):
    return (np.arange(size * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING


def draw(metadata, rng, size=SIZE):
    """A picture of exactly the objects in `metadata`, uint8 [size, size, 3]. What the metadata leaves open (place,
    width, unnamed colours) is drawn from the numpy Generator `rng`. ValueError if so many objects do not fit."""
    include = metadata["include"]
    groups = np.array([g for g, item in enumerate(include) for _ in range(item["count"])])
    relations = [(g, item["position"][0], item["position"][1]) for g, item in enumerate(include) if "position" in item]
    boxes = _layout(groups, relations, rng)
    names = list(COLORS)
    things = [(include[g]["class"], include[g].get("color") or names[rng.integers(len(names))]) for g in groups]
    return _paint(things, boxes, size)


def _paint(things, boxes, size):
    """The objects `things`, (class, colour) each, in `boxes` [N, 4] at size 32: uint8 [size, size, 3]."""
    picture = np.full((size, size, 3), 255, np.float32)
    grid, s = _subpixels(size), SUPERSAMPLING
    for (name, color), (x0, y0, x1, y1) in zip(things, boxes * (size / SIZE)):
        left, top, right, bottom = int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))
        x, y = grid[left * s : right * s], grid[top * s : bottom * s, None]
        if name == "circle":
            inside = (x - (x0 + x1) / 2) ** 2 + (y - (y0 + y1) / 2) ** 2 <= ((x1 - x0) / 2) ** 2
        elif name == "square":
            inside = (np.abs(x - (x0 + x1) / 2) <= (x1 - x0) / 2) & (np.abs(y - (y0 + y1) / 2) <= (y1 - y0) / 2)
        else:  # a triangle stands on its base; it is as high as it is wide
            inside = (np.abs(x - (x0 + x1) / 2) * 2 <= y - y0) & (y <= y1)
        cover = inside.reshape(bottom - top, s, right - left, s).mean((1, 3), dtype=np.float32)
        patch = picture[top:bottom, left:right]
        patch += cover[..., None] * (np.array(COLORS[color], np.float32) - patch)
    return np.rint(picture).astype(np.uint8)


def pictures(seed, start, count, prompts=None, size=SIZE):
    """Pictures `start` ... `start + count - 1` of the endless stream `seed`, and their metadata: (uint8
    [count, size, size, 3], list of dicts). Picture k is a function of (seed, start + k) alone, so a stream can be cut
    anywhere and gone on with. `prompts` defaults to `train_prompts()`."""
    groups = _by_tag(train_prompts() if prompts is None else prompts)
    out, metadata = np.empty((count, size, size, 3), np.uint8), []
    for k in range(count):
        rng = np.random.default_rng([seed, start + k])
        metadata.append(_sample(groups, rng))
        out[k] = draw(metadata[-1], rng, size)
    return out, metadata


# ----------------------------------------------------------------------------------------------------------------------
# Edits


@functools.cache
def _all_edits():
    things = {(color, name): _item(name, 1, color) for color, name in itertools.product(COLORS, CLASSES)}
    out = []

    def edit(tag, prompt, reverse_prompt, source, target):
        # The items are shared between all edits: 25,000 with their own would be 50 MB.
        items = [[things[thing] for thing in scene] for scene in (source, target)]
        texts = {"prompt": prompt, "reverse_prompt": reverse_prompt}
        out.append({"tag": tag, "source": items[0], "include": items[1], **texts})

    for source in (scene for n in (1, 2, 3) for scene in itertools.combinations(things, n)):
        others = [thing for thing in things if thing not in source]
        for k, (color, name) in enumerate(source):
            for new in others:
                target = (*source[:k], new, *source[k + 1 :])
                if new[1] == name:
                    back = f"make the {new[0]} {name} {color}"
                    edit("recolor", f"make the {color} {name} {new[0]}", back, source, target)
                elif new[0] == color:
                    back = f"turn the {color} {new[1]} into a {name}"
                    edit("reshape", f"turn the {color} {name} into a {new[1]}", back, source, target)
            rest = (*source[:k], *source[k + 1 :])
            if len(source) > 1:
                edit("remove", f"remove the {color} {name}", f"add a {color} {name}", source, rest)
            for j, relation in itertools.product(range(len(source)), RELATIONS):
                if j != k:  # the way back depends on the picture; what moved is told last, as it refers to another
                    there = f"the {source[j][0]} {source[j][1]}"
                    edit("move", f"move the {color} {name} {relation} {there}", None, source, (*rest, source[k]))
                    out[-1]["move"] = k, relation, j
        if len(source) < 3:
            for color, name in others:
                back = f"remove the {color} {name}"
                edit("add", f"add a {color} {name}", back, source, (*source, (color, name)))
    return out


@functools.cache
def _edit_split():
    """(train, held out) edits, each in the order of `all_edits`."""
    groups = {}  # scenes by their number of objects, instructions by tag
    for e in _all_edits():
        groups.setdefault(len(e["source"]), {})[repr(e["source"])] = True
        groups.setdefault(e["tag"], {})[e["prompt"]] = True
    held_out = set()
    for group in groups.values():
        by_hash = sorted(group, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
        held_out.update(by_hash[: max(1, round(HELD_OUT_SHARE * len(by_hash)))])
    sides = [], [], []
    for e in _all_edits():
        sides[(repr(e["source"]) in held_out) + (e["prompt"] in held_out)].append(e)
    return sides[0], sides[2]


def all_edits():
    """Every edit of a scene of 1 to 3 different objects into another one, in a fixed order: a list of dicts with the
    objects of the picture `source`, those that should come out `include`, the instruction `prompt` and the one that
    undoes it, `reverse_prompt` (None where an object is moved: that depends on the picture). They share their items:
    copy before you change one."""
    return list(_all_edits())


def train_edits():
    """The edits of about 80 % of the scenes by about 80 % of the instructions of each tag: 64 % of `all_edits`."""
    return list(_edit_split()[0])


def held_out_edits():
    """The edits of the other scenes by the other instructions, 4 % of `all_edits`: both the source's set of objects and
    the text of the instruction are new to whoever saw `train_edits` (a target scene may be known from there)."""
    return list(_edit_split()[1])


def _place(boxes):
    """For each of the boxes: [relation, index] to the first earlier box that it clearly has a relation to, or None."""
    out = []
    for i, box in enumerate(boxes):
        offsets = box_offset(box, boxes[:i])
        clear = ([r, j] for j in range(i) for r, d in RELATIONS.items() if offsets[j] @ d >= POSITION_MARGIN)
        out.append(next(clear, None))
    return out


def _move(count, mover, relation, anchor, rng):
    """Boxes [count, 4] of a picture, those of the one in which object `mover` lies in `relation` to `anchor` and the
    others where they were, and the relation in which it clearly was before."""
    direction = np.array(RELATIONS[relation])
    while True:
        # Drawn anew, too: there is hardly a picture with room for the object on two opposite sides of the other.
        before = [name for name in RELATIONS if name != relation][rng.integers(len(RELATIONS) - 1)]
        boxes = _layout(np.arange(count), [(mover, before, anchor)], rng)
        if box_offset(boxes[mover], boxes[anchor]) @ direction > MOVE_MARGIN:
            continue
        others, width = np.delete(boxes, mover, 0), boxes[mover, 2] - boxes[mover, 0]
        places = (SIZE - 2 * BORDER - width) / LATTICE + 1
        corner = BORDER + LATTICE * np.floor(rng.random((CANDIDATES, 2)) * places)
        moved = np.concatenate([corner, corner + width], 1)[:, None]
        fits = (np.maximum(moved[..., :2] - others[:, 2:], others[:, :2] - moved[..., 2:]).max(-1) >= GAP).all(1)
        fits &= box_offset(moved, boxes[anchor])[:, 0] @ direction >= POSITION_MARGIN
        if fits.any():
            return boxes, np.concatenate([boxes[:mover], moved[fits.argmax()], boxes[mover + 1 :]]), before


def edits(seed, start, count, prompts=None, size=SIZE):
    """Edits `start` ... `start + count - 1` of the endless stream `seed`: (source pictures and target pictures, both
    uint8 [count, size, size, 3], list of metadata). Edit k is a function of (seed, start + k) alone. `prompts` defaults
    to `train_edits()`; tags and numbers of objects come equally often.

    What is not edited stays where it is. So the metadata tells of the target, beside its objects, where the source
    shows it clearly, how they lie to each other: a picture drawn anew from the instruction alone is no edit.
    """
    groups = {}
    for e in _edit_split()[0] if prompts is None else prompts:
        groups.setdefault((e["tag"], len(e["source"])), []).append(e)
    groups = list(groups.values())
    sources, targets = np.empty((2, count, size, size, 3), np.uint8)
    metadata = []
    for k in range(count):
        rng = np.random.default_rng([seed, start + k])
        e = _sample(groups, rng)
        before, after = ([(item["class"], item["color"]) for item in e[key]] for key in ("source", "include"))
        include, source = ([dict(item) for item in e[key]] for key in ("include", "source"))
        texts = {name: e[name] for name in ("prompt", "reverse_prompt")}
        if e["tag"] == "move":
            mover, relation, anchor = e["move"]
            boxes, after_boxes, was = _move(len(before), mover, relation, anchor, rng)
            order = [i for i in range(len(before)) if i != mover]
            after_boxes, kept = after_boxes[[*order, mover]], order
            include[-1]["position"] = [relation, order.index(anchor)]
            texts["reverse_prompt"] = e["prompt"].replace(f" {relation} ", f" {was} ")
        else:
            boxes = _layout(np.arange(max(len(before), len(after))), [], rng)  # an added object is the last one
            kept = [i for i, thing in enumerate(before) if thing in after or e["tag"] != "remove"]
            after_boxes = boxes if e["tag"] == "add" else boxes[kept]
        sources[k] = _paint(before, boxes[: len(before)], size)
        targets[k] = _paint(after, after_boxes, size)
        for item, position in zip(include, _place(after_boxes[: len(kept)])):
            if position:
                item["position"] = position
        metadata.append({"tag": e["tag"], "source": source, "include": include, **texts})
    return sources, targets, metadata
