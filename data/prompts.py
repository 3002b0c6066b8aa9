"""Prompts, with optional metadata and images, from a text file, JSON lines, parquet, the Hugging Face hub, or a world
of our own: `shapes` to draw, `shapes-user` the same in a user's words, `shapes-edit` to edit, `shapes-qa` to ask about,
`arithmetic` to solve.

    train = load("data/ocr.txt")                       # 90 % of the file
    test = load("data/ocr.txt", split="eval")          # the other 10 %: no prompt text is on both sides
    rows = order(len(train), seed, cursor, count)      # which prompts come next; `cursor` is all there is to save
    train[rows[0]]                                     # {"prompt": str, "metadata": dict, "image": None | PIL.Image}
    images([train[i] for i in rows], 512, 512)         # those images as one tensor, or None

The prompt of a .jsonl line or a parquet row is its field "prompt" or, where that is not text, "question" (GSM8K) or
"problem" (MATH); these two need an "answer", or a "solution", which then stands for it: both for the reward `math`. On
the hub, config, split and column are optional: hub:openai/gsm8k/main:test, hub:HuggingFaceH4/MATH-500:test,
"hub:EleutherAI/hendrycks_math/*:train" for all configs. Without a split it is the train files, if there are any.

Everything is checked once, in `load`, so that a broken line 70,000 stops a run before the models are loaded. After that
only one int64 a prompt stays in memory: a byte offset or a row number; text and images are read on access. (The shapes
world has no files: its pictures to edit or to ask about, 14 MB each, are drawn once and kept.)
"""

import functools
import hashlib
import io
import json
import os
import re
from array import array
from bisect import bisect_right
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

KNOWN = (
    ".txt (one prompt a line), .jsonl (GenEval, GSM8K or MATH format), .parquet, hub:owner/name/config:split#column, "
    "shapes, shapes-user, shapes-edit, shapes-qa, shapes#tag,tag, arithmetic"
)
WORLDS = ("shapes", "shapes-user", "shapes-edit", "shapes-qa")  # of data/shapes.py; they know what they hold out
NUM_EDITS = 4096, 512  # of shapes-edit: to train on, held out
NUM_QUESTIONS = 4096, 512  # of shapes-qa
NUM_PHRASINGS = 8064, 864  # of shapes-user, of each of 6 tags as many


class PromptSet:
    """`rows` int64 [len]: where each prompt is; `read(row)` -> (prompt, metadata, image, where), the image as a file,
    bytes, a picture or None."""

    def __init__(self, rows, read):
        self.rows, self.read = rows, read

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        prompt, metadata, image, where = self.read(int(self.rows[i]))
        return {"prompt": prompt, "metadata": metadata, "image": None if image is None else _decode(image, where)}

    def texts(self):
        """The entries in order, without their images."""
        for row in self.rows:
            prompt, metadata, _, _ = self.read(int(row))
            yield {"prompt": prompt, "metadata": metadata}


def load(source, split="train", held_out=0.1, eval_source=None):
    """The prompts of `source` (see KNOWN) as a PromptSet.

    split: "train", "eval" or "all". The eval split is the prompts whose text hashes into the lowest `held_out` part of
    the hash range: no state, and a prompt stays on its side when the file is shuffled or grows. `shapes` brings its
    own.
    eval_source: the file that evaluation uses instead. "train" is then all of `source` but the prompts which are also
    in that file (training on GenEval-like prompts must leave the benchmark's own out), and "eval" is all of that file.
    Raises ValueError, "FILE:LINE: expected ..., got ..." where a line is to blame, and FileNotFoundError.
    """
    if split not in ("train", "eval", "all"):
        raise ValueError(f'expected split "train", "eval" or "all", got {split!r}')
    if not 0 <= held_out <= 1:
        raise ValueError(f"expected held_out between 0 and 1, got {held_out}")
    if split == "eval" and eval_source is not None:
        # A file given for evaluation is all of it for evaluation; the shapes world knows its own held-out part.
        return load(eval_source, split="eval" if _brings_split(eval_source) else "all")
    rows, keys, read = _scan(source)
    if split == "all":
        return PromptSet(rows, read)
    if eval_source is not None:
        eval_rows, eval_keys, _ = _scan(eval_source)
        keep = ~np.isin(keys, eval_keys[eval_rows < 0] if _brings_split(eval_source) else eval_keys)
        if _brings_split(source):
            keep &= rows >= 0  # what the world holds out is never trained on, whichever part of it is evaluated
        why = f"all of its prompts are also in {eval_source}"
    else:
        is_eval = rows < 0 if _brings_split(source) else keys < held_out * 2.0**64
        keep = is_eval if split == "eval" else ~is_eval
        why = f"held_out={held_out} of its {len(rows):,} prompts leaves none for it"
    if not keep.any():
        raise ValueError(
            f"{source}: the {split} split is empty, {why}; give evaluation its own file with --eval-prompts"
        )
    return PromptSet(rows[keep], read)


def images(rows, height, width):
    """The images of PromptSet entries as float [0, 1] [len(rows), 3, height, width]; None where no row has one.

    Each is cut around its centre to the aspect ratio asked for and resized (Lanczos, antialiased, at the cut with what
    lies behind it); one that has the size already is copied exactly. Raises ValueError, naming the first row without an
    image, where others have one.
    """
    without = [i for i, row in enumerate(rows) if row["image"] is None]
    if len(without) == len(rows):
        return None
    if without:
        prompt = rows[without[0]]["prompt"]
        raise ValueError(
            f"prompt {_short(prompt)!r} (row {without[0]} of {len(rows)}) has no image and others have one: "
            "expected an image for every prompt or for none"
        )
    fitted = (ImageOps.fit(row["image"].convert("RGB"), (width, height), Image.Resampling.LANCZOS) for row in rows)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))
    return pixels.permute(0, 3, 1, 2).float() / 255


def rgb(image):
    """A PIL image as it is meant to be seen: turned as its EXIF says, on white where it is transparent, RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def check_images(prompt_set, reference_images):
    """Whether the entries of a PromptSet have images, judged by its first; ValueError where that does not suit a model
    whose reference_images are "none", "optional" or "required" (models/__init__.py)."""
    has_images = prompt_set[0]["image"] is not None
    if has_images and reference_images == "none":
        raise ValueError("--prompts have images and --model makes pictures from text: expected a model that edits")
    if not has_images and reference_images == "required":
        raise ValueError("--model edits pictures and --prompts have none: expected e.g. shapes-edit, data/edits.jsonl")
    return has_images


def order(size, seed, start, count):
    """Entries start .. start+count of an endless stream of epochs over range(size): int64 [count].

    Epoch e is a permutation that depends on (seed, e) only, so the whole state of the data is the integer `start`. With
    w ranks of P prompts, rank r takes [r*P : (r+1)*P] of order(size, seed, cursor, w*P) and all advance the cursor by
    w*P: the stream is the same for any w. Ranks are disjoint within an epoch; in the one call that runs over its end
    the first prompts of the next epoch may repeat some of the last, and w*P > size has to repeat.
    Cost: one shuffle per new epoch touched (about 20 ms per million), then a slice.
    """
    if size < 1 or start < 0 or count < 0:
        raise ValueError(f"expected size >= 1, start >= 0 and count >= 0, got {size}, {start}, {count}")
    size, start, count = int(size), int(start), int(count)
    pieces = [np.empty(0, np.int64)]
    while count > 0:
        epoch, at = divmod(start, size)
        piece = _epoch(size, int(seed), epoch)[at : at + count]
        pieces.append(piece)
        start, count = start + len(piece), count - len(piece)
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=2)  # the train and the eval stream; 8 bytes a prompt
def _epoch(size, seed, epoch):
    permutation = np.random.default_rng([seed, epoch]).permutation(size)
    permutation.setflags(write=False)
    return permutation


# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each _scan_* is the validation pass: -> rows int64 [n], keys uint64 [n] (hash of the prompt), read(row).


def _scan(source):
    source = str(source)
    if source == "arithmetic":
        return _scan_arithmetic()
    if _brings_split(source):
        return _scan_shapes(source)
    if source.startswith("hub:"):
        paths, column = _download(source)
    else:
        paths, column = [Path(source)], None
        if paths[0].suffix not in (".txt", ".jsonl", ".parquet"):
            raise ValueError(f"{source}: unknown kind of prompts {paths[0].suffix or source!r}; known: {KNOWN}")
        if not paths[0].is_file():
            raise FileNotFoundError(f"{source}: no such file; --prompts takes: {KNOWN}")
    rows, keys, read = (_scan_parquet if paths[0].suffix == ".parquet" else _scan_lines)(paths, column)
    if len(rows) == 0:
        raise ValueError(f"{source}: expected at least one prompt, got an empty file")
    return rows, keys, read


def _scan_lines(paths, column):
    parse = functools.partial(_parse_json, column=column) if paths[0].suffix == ".jsonl" else _parse_text
    starts = np.cumsum([0] + [path.stat().st_size for path in paths])[:-1].tolist()  # a row is a byte of all files
    rows, keys = array("q"), array("Q")
    for path, offset in zip(paths, starts):
        with open(path, "rb") as file, _progress(path, path.stat().st_size, "B") as progress:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if _parse_text(line, path, where, number == 1)[0]:
                    prompt, _, image, _ = parse(line, path, where, number == 1)
                    if image is not None and not image.is_file():
                        raise ValueError(f"{where}: expected an image file, got {image}, which does not exist")
                    if len(rows) == 0:
                        with_images = image is not None
                    elif with_images != (image is not None):
                        has = "has no image and those above have one" if with_images else "is the first with an image"
                        raise ValueError(f"{where}: {has}; expected one in every line or in none")
                    rows.append(offset)
                    keys.append(_key(prompt))
                offset += len(line)
                progress.update(len(line))

    def read(row):
        number = bisect_right(starts, row) - 1
        path, offset = paths[number], row - starts[number]
        with open(path, "rb") as file:  # opened anew: safe in threads and forked workers, some 10 us
            file.seek(offset)
            return parse(file.readline(), path, f"{path}: byte {offset}", offset == 0)

    return np.array(rows, dtype=np.int64), np.array(keys, dtype=np.uint64), read


def _parse_text(line, path, where, first):
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise ValueError(f"{where}: expected UTF-8 text, got byte 0x{bad:02x} at column {error.start + 1}") from None
    return text.strip(), {}, None, where


def _parse_json(line, path, where, first, column):
    text = _parse_text(line, path, where, first)[0]
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {_short(text)} ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_short(text)}")
    name = _prompt_field([key for key in metadata if isinstance(metadata[key], str)], metadata, column)
    if name is None:
        known = '"prompt", "question" or "problem"' if column is None else f'"{column}"'
        raise ValueError(f"{where}: expected a key {known}, got only {sorted(metadata)}")
    prompt, image = _checked(metadata.pop(name), where), metadata.pop("image", None)
    _set_answer(metadata, name if column is None else None, where)
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{where}: expected `image` to be a path (text), got {_short(json.dumps(image))}")
    return prompt, metadata, None if image is None else path.parent / image, where


def _prompt_field(texts, fields, column):
    """The field that is the prompt: the first by order of the names that is text (`texts`, a part of `fields`) or else
    the first that is there, for an error to say what it is; None if none is."""
    known = ("prompt", "question", "problem") if column is None else (column,)
    return next((name for name in known if name in texts), next((name for name in known if name in fields), None))


def _set_answer(metadata, name, where):
    """A solution stands for an answer that is missing. The reward `math` finds the result in it; without either, the
    line is not a problem, which it has to be where the prompt comes from the field "question" or "problem"."""
    if metadata.get("answer") is None and metadata.get("solution") is not None:
        metadata["answer"] = metadata["solution"]
    if name in ("question", "problem"):
        answer = metadata.get("answer")
        if answer is None:
            raise ValueError(f'{where}: expected "answer" or "solution" beside "{name}", got only {sorted(metadata)}')
        number_or_text = isinstance(answer, str | int | float) and not isinstance(answer, bool) and answer == answer
        if not number_or_text or not str(answer).strip():
            got = _short(repr(answer))
            raise ValueError(f'{where}: expected the answer beside "{name}" to be text or a number, got {got}')


def _scan_parquet(paths, column):
    import pyarrow as pa  # only here: text files need no pyarrow
    import pyarrow.parquet as pq

    def is_text(kind):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def is_image(kind):
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_scalar(kind):
        return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

    files, groups, keys = [], [], array("Q")  # groups: (file number, row group), in order
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: expected a parquet file, got: {str(error).splitlines()[0]}") from None
        schema = file.schema_arrow
        name = _prompt_field([f.name for f in schema if is_text(f.type)], schema.names, column)
        if name is None:
            known = "'prompt', 'question' or 'problem'" if column is None else repr(column)
            raise ValueError(f"{path}: expected a column {known}, got the columns {', '.join(schema.names)}")
        if not is_text(kind := schema.field(name).type):
            chat = ", and chat messages are not supported" if pa.types.is_nested(kind) else ""
            raise ValueError(f"{path}: expected text in column {name!r}, got {kind}{chat}")
        if "image" in schema.names and not is_image(schema.field("image").type):
            kind = schema.field("image").type
            raise ValueError(f"{path}: expected bytes or a struct of bytes and path in column 'image', got {kind}")
        extra = [f.name for f in schema if f.name not in (name, "image") and is_scalar(f.type)]
        problem = name if column is None and name != "prompt" else None
        to_check = [name, *(f for f in extra if problem and f in ("answer", "solution"))]
        number, total = 0, file.metadata.num_rows
        with _progress(path, total, " rows") as progress:
            for batch in file.iter_batches(columns=to_check):
                for row in batch.to_pylist():
                    number += 1
                    keys.append(_key(_checked(row.pop(name), f"{path}:{number}")))
                    _set_answer(row, problem, f"{path}:{number}")
                progress.update(batch.num_rows)
        groups += [(len(files), group) for group in range(file.num_row_groups)]
        files.append((path, file, [name, *extra, *(["image"] if "image" in schema.names else [])]))
    sizes = [files[f][1].metadata.row_group(group).num_rows for f, group in groups]
    ends = np.cumsum(sizes, dtype=np.int64)
    file_start = np.cumsum([0] + [file.metadata.num_rows for _, file, _ in files])

    @functools.lru_cache(maxsize=1)  # one row group stays in memory; shuffled access to many groups rereads them
    def table(group):
        number, local = groups[group]
        return files[number][1].read_row_group(local, columns=files[number][2])

    def read(row):
        group = int(np.searchsorted(ends, row, side="right"))
        start = int(ends[group]) - sizes[group]
        number = groups[group][0]
        metadata = table(group).slice(row - start, 1).to_pylist()[0]
        path, _, (name, *_) = files[number]
        where = f"{path}:{row - int(file_start[number]) + 1}"
        prompt, image = metadata.pop(name), metadata.pop("image", None)
        _set_answer(metadata, None, where)
        if isinstance(image, dict):
            file = image.get("path")
            image = image["bytes"] if image["bytes"] is not None else None if file is None else Path(path).parent / file
        return prompt.strip(), metadata, image, where

    return np.arange(len(keys), dtype=np.int64), np.array(keys, dtype=np.uint64), read


def _download(source):
    """hub:owner/name/config:split#column -> (parquet or JSON lines files, column or None)."""
    import huggingface_hub
    from huggingface_hub import errors

    rest, number_sign, column = source.removeprefix("hub:").partition("#")
    rest, colon, split = rest.partition(":")
    owner, name, config = (rest.split("/", 2) + ["", ""])[:3]
    if not owner or not name or (colon and not split) or (number_sign and not column):
        raise ValueError(f"expected hub:owner/name or more of hub:owner/name/config:split#column, got {source}")
    name, found, why = f"{owner}/{name}", [], None
    # The second is the hub's own conversion of JSON and CSV data sets, which private ones do not have.
    for revision, kind in (("main", ".parquet"), ("refs/convert/parquet", ".parquet"), ("main", ".jsonl")):
        configs = []
        try:
            files = [file for file in list_files(name, revision) if file.endswith(kind)]
            chosen, configs = choose_files(files, config, split)
            found += files
            if chosen and len(configs) == 1:
                folder = huggingface_hub.snapshot_download(
                    name, repo_type="dataset", revision=revision, allow_patterns=chosen
                )
                return [Path(folder) / file for file in chosen], column or None
        except errors.RevisionNotFoundError:
            pass  # no conversion
        except errors.GatedRepoError:
            why = why or "its owner grants access on request"
        except errors.RepositoryNotFoundError:
            why = why or "no such data set, or a private one"
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            why = why or "not in the local cache, and no connection to the hub"
        except (OSError, ValueError, errors.HTTPError) as error:
            why = why or (str(error).strip() or repr(error)).splitlines()[0]
        if len(configs) > 1:
            raise ValueError(
                f"{source}: it has the configs {', '.join(configs)}; expected one, as in hub:{name}/{configs[0]}"
            )
    if found and why is None:
        shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(f"{source}: expected a config and a split with files, got none of them, only {shown}")
    raise ValueError(
        f"hub:{name}: cannot get its parquet or .jsonl files ({why or 'it has none'}); check the id and the network,"
        f" and for a gated or private data set ask for access at huggingface.co/datasets/{name}, then `hf auth login`"
    )


def list_files(name, revision):
    """The paths in a data set of the hub; what the cache has of it where the hub cannot be asked."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # list_repo_files would try for 20 s where there is no network
        return sorted(file.rfilename for file in huggingface_hub.dataset_info(name, revision=revision).siblings)
    except errors.RevisionNotFoundError:
        raise
    except (OSError, errors.HTTPError) as error:
        cached = {"repo_id": name, "repo_type": "dataset", "revision": revision}
        try:  # this also names what an earlier download left out or did not get to
            return sorted(file.path for file in huggingface_hub.get_cached_repo_tree(**cached))
        except AttributeError:
            pass  # huggingface_hub 1 keeps no such list
        except errors.CachedRepoTreeNotFoundError:
            pass
        try:
            folder = Path(huggingface_hub.snapshot_download(**cached, allow_patterns=[], local_files_only=True))
        except errors.LocalEntryNotFoundError as missing:
            raise (error if isinstance(error, errors.HfHubHTTPError) else missing) from None
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def choose_files(files, config, split):
    """Of the paths `files` those of one config and split, and the configs these are of: one, or all that `config` could
    mean. A config is the folders of a file but for data/ and those of a split: main/train-0.parquet is of "main"."""
    a_split = re.compile(r"(partial-)?(train(ing)?|test|val(id(ation)?)?|dev|eval(uation)?)(?![A-Za-z0-9])")
    config_of, rest_of = {}, {}
    for file in files:
        *folders, last = file.split("/")
        own = [folder for folder in folders if folder != "data" and not a_split.match(folder)]
        config_of[file] = "/".join(own) or "default"
        rest_of[file] = "/".join([folder for folder in folders if folder not in own] + [last])
    files = [file for file in files if fnmatchcase(config_of[file], config or "*")]
    # As a word of its own, so that test is not "latest"; train_sft and gsm8k_train are "train" if nothing else is.
    word = re.escape(split or "train")
    tries = [rf"(?<!\w){word}(?!\w)", rf"(?<![^\W_]){word}(?![^\W_])", *([] if split else ["train", ""])]
    chosen = next(filter(None, ([file for file in files if re.search(t, rest_of[file])] for t in tries)), [])
    return chosen, [config] if config else sorted({config_of[file] for file in chosen})


def _brings_split(source):
    return str(source) == "arithmetic" or str(source).split("#")[0] in WORLDS


def _scan_arithmetic():
    from data import arithmetic

    items = arithmetic.train_problems() + arithmetic.held_out_problems()

    def read(row):
        return items[row]["prompt"], dict(items[row]["metadata"]), None, "arithmetic"

    rows = np.arange(len(items), dtype=np.int64)
    rows[-arithmetic.NUM_HELD_OUT :] -= len(items)  # negative rows are the held-out ones, as in _scan_shapes
    return rows, np.array([_key(item["prompt"]) for item in items], dtype=np.uint64), read


def _scan_shapes(source):
    from data import shapes, shapes_qa

    world, hash_sign, chosen = str(source).partition("#")
    known = {"shapes-edit": shapes.EDIT_TAGS, "shapes-qa": shapes_qa.TAGS}.get(world, shapes.TAGS)
    tags = chosen.split(",") if hash_sign else known
    unknown = [tag for tag in tags if tag not in known]
    if unknown:
        raise ValueError(f"{source}: expected tags out of {', '.join(known)}, got {unknown[0]!r}")
    if world == "shapes-edit":
        sides = [[edit for edit in side if edit[0]["tag"] in tags] for side in _edits()]
    elif world == "shapes-user":
        sides = [[(item, None) for item in side if item["tag"] in tags] for side in _phrasings()]
    elif world == "shapes-qa":
        sides = [[question for question in side if question[0]["tag"] in tags] for side in _questions()]
    else:
        sides = [shapes.train_prompts(), shapes.held_out_prompts()]
        sides = [_balanced([(item, None) for item in side if item["tag"] in tags]) for side in sides]
    items = sides[0] + sides[1]

    def read(row):
        metadata = dict(items[row][0])
        return metadata.pop("prompt"), metadata, items[row][1], "shapes"

    rows = np.arange(len(items), dtype=np.int64)
    rows[len(sides[0]) :] -= len(items)  # negative rows are the held-out ones, and index `items` all the same
    keys = [item["prompt"] for item, _ in items]
    if world == "shapes-qa":  # the same 22 questions are asked on both sides: the picture tells them apart
        keys = [key + hashlib.sha256(picture.tobytes()).hexdigest() for key, (_, picture) in zip(keys, items)]
    return rows, np.array([_key(key) for key in keys], dtype=np.uint64), read


@functools.cache
def _phrasings():
    """(train, held out) lists of metadata whose prompt is what a user says for the caption. Captions of a tag come
    equally often, within one."""
    from data import phrases, shapes

    sides = []
    for stream, captions in enumerate((shapes.train_prompts(), shapes.held_out_prompts())):
        side, num = [], NUM_PHRASINGS[stream] // len(shapes.TAGS)
        for group in ([item for item in captions if item["tag"] == tag] for tag in shapes.TAGS):
            for k in range(num):
                item = group[k * len(group) // num]
                side.append({**item, "prompt": phrases.user_prompt(item, np.random.default_rng([stream, len(side)]))})
        sides.append(side)
    return sides


@functools.cache
def _questions():
    """(train, held out) lists of (metadata, picture), a fixed piece of the world's stream 0. Takes three seconds."""
    from data import shapes_qa

    sides = []
    for count, side in zip(NUM_QUESTIONS, ("train", "held_out")):
        pictures, rows = shapes_qa.questions(0, 0, count, side)
        rows = [{**row["metadata"], "prompt": row["prompt"]} for row in rows]
        sides.append([(row, Image.fromarray(picture)) for row, picture in zip(rows, pictures)])
    return sides


@functools.cache
def _edits():
    """(train, held out) lists of (metadata, source picture): a fixed piece of the world's stream 0. Takes a second."""
    from data import shapes

    sides = []
    for count, known in zip(NUM_EDITS, (shapes.train_edits(), shapes.held_out_edits())):
        sources, _, metadata = shapes.edits(0, 0, count, known)
        sides.append([(item, Image.fromarray(picture)) for item, picture in zip(metadata, sources)])
    return sides


def _balanced(items):
    """Every tag as often as the one with most prompts: nine in ten of the world's prompts are about positions."""
    tags = {}
    for item in items:
        tags.setdefault(item[0]["tag"], []).append(item)
    most = max(len(group) for group in tags.values())
    return [group[i % len(group)] for group in tags.values() for i in range(most)]


def _checked(prompt, where):
    if not isinstance(prompt, str):
        chat = ", and chat messages are not supported" if isinstance(prompt, list) else ""
        raise ValueError(f"{where}: expected the prompt to be text, got {_short(repr(prompt))}{chat}")
    if not prompt.strip():
        raise ValueError(f"{where}: expected a prompt, got blank text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: expected text, got a lone surrogate in {_short(ascii(prompt))}") from None
    return prompt.strip()


def _key(prompt):
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big")


def _decode(image, where):
    if isinstance(image, Image.Image):
        return image.copy()
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return rgb(opened)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: expected an image that PIL can read, got: {error}") from None


def _short(text):
    return text if len(text) <= 60 else text[:57] + "..."


def _progress(path, total, unit):
    """Appears after 2 s, on rank 0 only: small files show nothing."""
    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, unit=unit, unit_scale=True, desc=f"checking {path}", delay=2, leave=False, disable=quiet)
