"""Endless, resumable streams of pictures and texts to train on, for data sets too large to be checked or held whole.

    stream = Stream("hub:owner/name/data_512#prompt", seed, rank, world_size)
    rows = stream.next(16)          # [{"prompt", "image", "source", "answer", "where", "at"}, ...]
    state = stream.state()          # a dict of ints; load_state(state) goes on as if nothing had stopped
    mixed = Mixture([(stream, 3.0), (Stream("edits/*.parquet#instruction,image=after,source=before", ...), 1.0)], seed)
    batch = Batches(mixed, 32, area=512 * 512, multiple=16).next()    # 32 rows, pictures of one size

What a source may be (`SPEC#prompt`, `SPEC#prompt,image=NAME,source=NAME,answer=NAME` where names differ from these):

    shards/*.tar    webdataset: members that share a name make a sample: 17.jpg (.jpeg .png .webp), 17.txt or 17.json,
                    for editing 17.source.jpg or a key "source" in 17.json, a member's name relative to that of 17.json
    *.parquet       one sample a row: a picture is bytes, a struct of bytes and path, or a path
    *.jsonl         one sample a line: a picture is a path relative to the file
    pictures/       a folder and those below it, named as in a tar
    hub:owner/name/config:split#prompt   as in data/prompts.py, the .parquet or else the .tar files of a data set;
                    downloaded when their turn comes, one ahead. They stay in the hub's cache: it needs the disk space.

The prompt is the first there is of "prompt", "caption", "text", "question"; of a list of texts one is drawn per epoch.
`image` is what the model is to paint, or to answer a question about; `source` what an edit starts from.

Order. In epoch e the files are permuted by (seed, e) and dealt to the ranks; with fewer files than ranks every rank
takes every world_size-th row of each. A file's rows are permuted (in parquet within their row group, and the row
groups), and blocks of `shuffle_buffer` rows, which may span files, once more. So a rank's position is four integers,
and ranks never wait for each other: one whose files were shorter begins its next epoch earlier. Over the ranks, every
good sample comes once in every epoch.

Memory: the last four files stay open, a tar with the offsets of its members (some 0.8 KB a sample), a parquet file with
one row group; the encoded pictures of a block of parquet rows; decoded are only the pictures asked for.
"""

import glob
import hashlib
import io
import json
import math
import os
import sys
import tarfile
import time
from array import array
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Thread

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.prompts import choose_files, list_files, rgb
from kernels.sde_step import fold_seed

KNOWN = "*.tar, *.parquet, *.jsonl, a folder of pictures, hub:owner/name/config:split#column"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
PROMPTS = ("prompt", "caption", "text", "question")
MAX_PIXELS = 2**26  # of a picture, 8192 x 8192: more is a decompression bomb or a mistake
FIRST_BAD = 20  # this many bad samples and not one good: the data are not what they were taken for
ENOUGH = 1000  # samples seen before their bad share is judged
SHARES, ROWS, BLOCK = range(3)  # what a permutation is for: part of its seed


class BadSample(ValueError):
    """A sample to be skipped. kind: "image" (that or the source), "prompt" (any text), "file" (a shard or its rest)."""

    def __init__(self, kind, where, why):
        super().__init__(f"{where}: {why}")
        self.kind = kind


class Shard:
    """An opened file: `fetch(entry)` -> (fields, where) for entries 0 .. size. groups: ends of the parts (row groups)
    that are dear to go back to; fetch is then called in their order, else in any, from threads."""

    def __init__(self, size, fetch, groups=None):
        self.size, self.fetch, self.groups = size, fetch, groups


class Stream:
    """The endless stream of one source, as one rank sees it.

    seed, rank, world_size: the order is a function of these and the list of files.
    shuffle_buffer: rows shuffled together; those of parquet files are held encoded (1,000 of 0.4 MB: 0.4 GB).
    max_bad: share of samples that may be unreadable. More among at least 1,000, or nothing else among the first 20,
    raises ValueError; till then each is skipped and named on stderr. A file that cannot be opened, and the missing end
    of a truncated one, count as one sample.
    num_threads: that read and decode; has no effect on the order.
    Raises ValueError and FileNotFoundError for a source that cannot be; the rows are read as they come. (To find what
    is wrong with them before the weights are loaded: state(), next(1), load_state().)
    """

    def __init__(self, spec, seed, rank=0, world_size=1, shuffle_buffer=1000, max_bad=0.01, num_threads=8):
        if not 0 <= rank < world_size or seed < 0 or shuffle_buffer < 1 or num_threads < 1 or not 0 <= max_bad <= 1:
            raise ValueError(
                "expected 0 <= rank < world_size, seed >= 0, shuffle_buffer >= 1, num_threads >= 1 and 0 <= max_bad "
                f"<= 1, got rank {rank}, world_size {world_size}, seed {seed}, shuffle_buffer {shuffle_buffer}, "
                f"num_threads {num_threads}, max_bad {max_bad}"
            )
        self.spec, self.seed, self.rank, self.world_size = str(spec), int(seed), int(rank), int(world_size)
        self.shuffle_buffer, self.max_bad = int(shuffle_buffer), max_bad
        self.names, self.local, self.roles = _resolve(self.spec)
        self.pool = ThreadPoolExecutor(num_threads)
        # `drawn` rows are taken of the block that begins at row `row` of this rank's `shard`-th file of the epoch.
        self.at_epoch, self.at_shard, self.at_row, self.drawn = 0, 0, 0, 0
        self.block, self.block_end = None, None
        self.counted = dict(seen=0, bad_image=0, bad_prompt=0, bad_file=0)
        self.opened, self.ahead, self.lock, self.rows = OrderedDict(), (None, None), Lock(), (None, None)

    def next(self, count):
        """The next `count` good samples: dicts of prompt (str), image (PIL, RGB, upright), source (the same, or None),
        answer (str or None), where (file and member, line or row) and at (ints, for `read`)."""
        rows = []
        while len(rows) < count:
            taken = [self._take() for _ in range(count - len(rows))]
            for row in self.pool.map(lambda item: self._caught(self._decoded, *item), taken):
                self.counted["seen"] += 1
                if isinstance(row, BadSample):
                    self.counted[f"bad_{row.kind}"] += 1
                    tqdm.write(f"skipped {row}", file=sys.stderr)
                else:
                    rows.append(row)
                self._check_bad(row)
        return rows

    def read(self, at):
        """The sample whose "at" this is, again. Raises BadSample if it has become unreadable."""
        epoch, file, entry = at
        return self._decoded(epoch, file, entry, self._open(file), None)

    def counts(self):
        """Samples seen, and the bad ones among them by kind, since the beginning of the run; for metrics."""
        return dict(self.counted)

    def state(self):
        """Where the stream is and which stream it is, all ints."""
        at = dict(epoch=self.at_epoch, shard=self.at_shard, row=self.at_row, drawn=self.drawn)
        return self._identity() | at | self.counted

    def load_state(self, state):
        """Go on from there. ValueError where the state is not one of this stream (other files, seed, rank, ...)."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"{self.spec}: the data state is of {name} {state.get(name)}, and this stream has {name} {value}; "
                    "resume with the same data, seed and number of ranks"
                )
        self.at_epoch, self.at_shard, self.at_row = state["epoch"], state["shard"], state["row"]
        self.drawn, self.block = state["drawn"], None
        self.counted = {name: state[name] for name in self.counted}

    def _identity(self):
        names = "\n".join(os.path.basename(os.path.normpath(name)) for name in self.names)  # data may move as a whole
        files = int.from_bytes(hashlib.blake2b(names.encode(), digest_size=6).digest(), "big")
        own = dict(seed=self.seed, rank=self.rank, world_size=self.world_size, shuffle_buffer=self.shuffle_buffer)
        return own | dict(files=files)

    def _check_bad(self, last):
        seen, bad = self.counted["seen"], sum(self.counted.values()) - self.counted["seen"]
        if bad == seen >= FIRST_BAD:
            raise ValueError(f"{self.spec}: the first {seen} samples are all bad, the last one: {last}")
        if seen >= ENOUGH and bad > self.max_bad * seen:
            kinds = ", ".join(f"{n} {name}" for name, n in self.counted.items() if n and name != "seen")
            raise ValueError(
                f"{self.spec}: {bad:,} of {seen:,} samples are bad ({kinds}), more than the share max_bad="
                f"{self.max_bad:g}; each is named above. Repair the data, or raise max_bad"
            )

    # Order

    def _share(self, epoch):
        """This rank's files of an epoch, in order. Which rank gets the odd one changes from epoch to epoch."""
        files = np.random.default_rng([self.seed, epoch, SHARES]).permutation(len(self.names)).tolist()
        if len(files) < self.world_size:
            return files
        return files[(self.rank + epoch) % self.world_size :: self.world_size]

    def _rows(self, epoch, position, file, shard):
        """This rank's entries of the `position`-th file of its share, in order; the last answer is kept."""
        if self.rows[0] != (epoch, file):
            rng = np.random.default_rng([self.seed, epoch, ROWS, file])
            if shard.groups is None:
                rows = rng.permutation(shard.size)
            else:
                parts = np.split(np.arange(shard.size), shard.groups[:-1])
                rows = np.concatenate([rng.permutation(parts[group]) for group in rng.permutation(len(parts))])
            if len(self.names) < self.world_size:
                rows = rows[(self.rank + epoch + position) % self.world_size :: self.world_size]
            self.rows = (epoch, file), rows
        return self.rows[1]

    def _fill(self):
        """Lay out the block that begins at the position; moves on to the next epoch where there is none in this one."""
        for _ in range(20 * self.world_size):  # with fewer rows than ranks some epochs are empty, but not all
            share = self._share(self.at_epoch)
            shard_number, row, items = self.at_shard, self.at_row, []
            while shard_number < len(share) and len(items) < self.shuffle_buffer:
                file = share[shard_number]
                following = share[shard_number + 1 :] or self._share(self.at_epoch + 1)
                shard = self._open(file, following[0])
                rows = self._rows(self.at_epoch, shard_number, file, shard)
                part = rows[row : row + self.shuffle_buffer - len(items)].tolist()
                for entry in part:
                    held = self._caught(shard.fetch, entry) if shard.groups is not None else None
                    items.append((self.at_epoch, file, entry, shard, held))
                row += len(part)
                if row >= len(rows):
                    shard_number, row = shard_number + 1, 0
            if items:
                key = [self.seed, self.at_epoch, BLOCK, self.rank, self.at_shard, self.at_row]
                self.block = [items[i] for i in np.random.default_rng(key).permutation(len(items))]
                self.block_end = shard_number, row
                return
            self.at_epoch, self.at_shard, self.at_row = self.at_epoch + 1, 0, 0
        raise ValueError(
            f"{self.spec}: expected samples in {self.names[0]}, got none in any of {len(self.names)} files"
        )

    def _take(self):
        if self.block is None:
            self._fill()
        item, self.block[self.drawn] = self.block[self.drawn], None  # no picture is held longer than it has to be
        self.drawn += 1
        if self.drawn == len(self.block):
            (self.at_shard, self.at_row), self.drawn, self.block = self.block_end, 0, None
        return item

    # Reading

    def _open(self, file, following=None):
        """The opened file of that number; `following` is opened (downloaded, indexed) in the background."""
        with self.lock:
            if file not in self.opened:
                number, future = self.ahead
                self.opened[file] = future.result() if number == file else self._load(file)
            self.opened.move_to_end(file)
            while len(self.opened) > 4:
                self.opened.popitem(last=False)
            if following is not None and following not in self.opened and self.ahead[0] != following:
                self.ahead = following, _background(self._load, following)
            return self.opened[file]

    def _load(self, file):
        name = self.names[file]
        path = self.local(name)
        kind = "folder" if path.is_dir() else path.suffix
        return {"folder": _folder, ".tar": _tar, ".jsonl": _lines, ".parquet": _parquet}[kind](path, name, self.roles)

    def _caught(self, function, *args):
        try:
            return function(*args)
        except BadSample as bad:
            return bad

    def _decoded(self, epoch, file, entry, shard, held):
        if isinstance(held, BadSample):
            raise held
        fields, where = held or shard.fetch(entry)
        prompt, answer = fields.get("prompt"), fields.get("answer")
        if isinstance(prompt, list) and prompt:
            prompt = prompt[int(fold_seed(self.seed, epoch, file, entry)) % len(prompt)]
        prompt = _text(prompt, "a prompt", where)
        if isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer:
            answer = str(answer)
        if answer is not None or self.roles["answer"]:
            answer = _text(answer, "an answer", where)
        if fields.get("image") is None:
            raise BadSample("image", where, "expected a picture, got none")
        if fields.get("source") is None and self.roles["source"]:
            raise BadSample("image", where, f"expected a picture {self.roles['source']!r}, got none")
        image = _picture(fields["image"], where)
        source = None if fields.get("source") is None else _picture(fields["source"], where)
        at = [epoch, file, entry]
        return dict(prompt=prompt, image=image, source=source, answer=answer, where=where, at=at)


class Mixture:
    """Several streams as one: each sample is of stream i with a probability in proportion to its weight, drawn by a
    hash of (seed, rank, number of the sample). To be used as a Stream is."""

    def __init__(self, streams, seed):
        """streams: a list of (stream, weight > 0)."""
        if not streams or not all(0 < weight < math.inf for _, weight in streams):
            raise ValueError(f"expected streams with weights > 0, got weights {[weight for _, weight in streams]}")
        self.streams, weights = zip(*streams)
        self.ends = np.cumsum(weights) / sum(weights)
        self.seed, self.rank, self.drawn = seed, self.streams[0].rank, 0

    def next(self, count):
        """As of a Stream; "at" begins with the number of the stream."""
        numbers = torch.arange(self.drawn, self.drawn + count)
        uniform = (fold_seed(self.seed, self.rank, numbers) % 2**53).double().numpy() / 2**53
        chosen = np.minimum(np.searchsorted(self.ends, uniform, side="right"), len(self.ends) - 1).tolist()
        rows = [iter(stream.next(chosen.count(i))) for i, stream in enumerate(self.streams)]
        self.drawn += count
        return [row | dict(at=[i, *row["at"]]) for i, row in ((i, next(rows[i])) for i in chosen)]

    def read(self, at):
        return self.streams[at[0]].read(at[1:]) | dict(at=list(at))

    def counts(self):
        counts = [stream.counts() for stream in self.streams]
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    def state(self):
        return dict(drawn=self.drawn, streams=[stream.state() for stream in self.streams])

    def load_state(self, state):
        if len(state["streams"]) != len(self.streams):
            raise ValueError(f"the data state is of {len(state['streams'])} streams, got {len(self.streams)}")
        self.drawn = state["drawn"]
        for stream, own in zip(self.streams, state["streams"]):
            stream.load_state(own)


class Batches:
    """Batches of pictures of one size, from a Stream or a Mixture.

    next() -> batch_size samples as of the stream, with image and source fitted to the one size (height, width) that
    `bucket` finds for the image; all of them have a source or none, all an answer or none. The next batch is made in
    the background.
    A sample waits until its bucket has a batch. Leftovers: when one has waited for `patience` batches, its bucket is
    filled up with the waiting samples nearest in aspect ratio (of its kind: with or without source, answer), and the
    batch takes the size at the median; so nothing is dropped, and a rare shape is cropped a little more instead of
    waiting for ever. Only a kind of which there are fewer than batch_size goes on waiting.
    Memory: at most (buckets * kinds + 1) * batch_size fitted pictures, and twice 16 as they come.
    """

    CHUNK = 16  # samples drawn at a time; a part of the order

    def __init__(self, stream, batch_size, area, multiple, patience=64):
        """area: of the pictures, in pixels, about; multiple: that sides must be of, e.g. 16 for FLUX."""
        if batch_size < 1 or patience < 1:
            raise ValueError(f"expected batch_size and patience >= 1, got {batch_size} and {patience}")
        self.sizes = buckets(area, multiple)
        self.stream, self.batch_size, self.area, self.multiple = stream, batch_size, area, multiple
        self.patience, self.pool = patience * batch_size, ThreadPoolExecutor(8)
        self.drawn, self.waiting = 0, []  # (number when drawn, (height, width), fitted sample), oldest first
        self.delivered, self.future = self._state(), None

    def next(self):
        self.future = self.future or _background(self._make)
        batch, self.delivered = self.future.result()  # if it raises, it will again
        self.future = _background(self._make)
        return batch

    def counts(self):
        """The stream's as of `state`: what the next batch has cost already is not counted yet."""
        state = self.delivered["stream"]
        states = state.get("streams", [state])
        return {name: sum(part[name] for part in states) for name in self.stream.counts()}

    def state(self):
        """As after the last batch that `next` returned; each waiting sample is a list of ints."""
        return self.delivered

    def load_state(self, state):
        """Go on from there: reads the samples that were waiting again. ValueError as of Stream.load_state."""
        if self.future is not None:
            self.future.exception()  # waits: the background must not go on drawing
        for name in ("batch_size", "area", "multiple", "patience"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the data state is of {name} {state[name]}, got {getattr(self, name)}")
        self.stream.load_state(state["stream"])
        self.drawn = state["drawn"]
        self.waiting = list(self.pool.map(self._waiting, state["waiting"]))
        self.delivered, self.future = self._state(), None

    def _state(self):
        own = {name: getattr(self, name) for name in ("batch_size", "area", "multiple", "patience", "drawn")}
        waiting = [[number, *size, *row["at"]] for number, size, row in self.waiting]
        return own | dict(stream=self.stream.state(), waiting=waiting)

    def _waiting(self, saved):
        number, height, width, *at = saved
        return number, (height, width), _fitted(self.stream.read(at), (height, width))

    def _make(self):
        while (chosen := self._choose()) is None:
            rows = self.stream.next(self.CHUNK)
            sizes = [bucket(*row["image"].size, self.area, self.multiple) for row in rows]
            self.waiting += zip(range(self.drawn, self.drawn + len(rows)), sizes, self.pool.map(_fitted, rows, sizes))
            self.drawn += len(rows)
        members, size = chosen
        numbers = {number for number, _, _ in members}
        self.waiting = [item for item in self.waiting if item[0] not in numbers]

        def at_size(item):  # from the file again: what the other size has cut away is gone
            return item[2] if item[1] == size else _fitted(self.stream.read(item[2]["at"]), size)

        return list(self.pool.map(at_size, members)), self._state()

    def _choose(self):
        """The samples of the next batch and its size, or None if more have to be drawn. The oldest go first."""
        groups, kinds = {}, {}
        for item in self.waiting:
            kind = item[2]["source"] is None, item[2]["answer"] is None
            groups.setdefault((kind, item[1]), []).append(item)
            kinds.setdefault(kind, []).append(item)
        full = None
        for (kind, size), group in groups.items():  # by age of their oldest
            if len(group) >= self.batch_size:
                full = full or (group[: self.batch_size], size)
            elif self.drawn - group[0][0] > self.patience and len(kinds[kind]) >= self.batch_size:
                near = sorted(kinds[kind], key=lambda item: (_apart(item[1], size), item[0]))[: self.batch_size]
                total = {size: sum(_apart(item[1], size) for item in near) for size in self.sizes}
                return near, min(self.sizes, key=total.get)
        return full


def buckets(area, multiple):
    """The sizes (height, width) of about `area` pixels with sides that are multiples of `multiple`, for the aspect
    ratios 1:1, 5:4, 4:3, 3:2, 16:9, 2:1 and upright ones; fewer where rounding makes them equal."""
    if multiple < 1 or area < multiple**2:
        raise ValueError(f"expected multiple >= 1 and area >= multiple^2, got multiple {multiple}, area {area}")
    wide = [1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2]

    def side(ratio):
        return max(1, round(math.sqrt(area * ratio) / multiple)) * multiple

    return list(dict.fromkeys((side(1 / r), side(r)) for ratio in wide for r in (ratio, 1 / ratio)))


def bucket(width, height, area, multiple):
    """The one of `buckets` nearest in aspect ratio (of the logarithms, so that wide and upright are alike) to a picture
    of that width and height: (height, width)."""
    return min(buckets(area, multiple), key=lambda size: _apart(size, (height, width)))


def fit(image, size):
    """A PIL picture as RGB of `size` (height, width): cut around its centre to that aspect ratio, resized by Lanczos,
    antialiased; one that has the size is left as it is."""
    image = image.convert("RGB")
    if image.size == (size[1], size[0]):
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


def _apart(size, other):
    return abs(math.log(size[1] / size[0]) - math.log(other[1] / other[0]))


def _fitted(row, size):
    return row | {name: row[name] and fit(row[name], size) for name in ("image", "source")}


# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each opener takes (path, name for messages, roles) and returns a Shard; fields are text or encoded pictures.


def _resolve(spec):
    """-> names of the files, local(name) -> Path, {role: its name or None}."""
    source, sign, columns = spec.partition("#")
    roles = dict(prompt=None, image=None, source=None, answer=None)
    for part in columns.split(",") if sign else []:
        role, equals, column = part.rpartition("=")
        role = role if equals else "prompt"
        if role not in roles or roles[role] or not column:
            raise ValueError(
                f"{spec}: expected #prompt or more of #prompt,image=NAME,source=NAME,answer=NAME, got {part!r}"
            )
        roles[role] = column
    if source.startswith("hub:"):
        return *_hub(source), roles
    names = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
    for name in names:
        if not os.path.exists(name):
            raise FileNotFoundError(f"{name}: no such file or folder; expected {KNOWN}")
        if not os.path.isdir(name) and Path(name).suffix not in (".tar", ".parquet", ".jsonl"):
            raise ValueError(f"{name}: unknown kind of data {Path(name).suffix or name!r}; known: {KNOWN}")
    if not names:
        raise FileNotFoundError(f"{source}: no file matches; expected {KNOWN}")
    return names, Path, roles


def _hub(source):
    import huggingface_hub
    from huggingface_hub import constants, errors

    rest, colon, split = source.removeprefix("hub:").partition(":")
    owner, repo, config = (rest.split("/", 2) + ["", ""])[:3]
    if not owner or not repo or (colon and not split):
        raise ValueError(f"expected hub:owner/name or more of hub:owner/name/config:split#column, got {source}")
    repo = f"{owner}/{repo}"
    try:
        files = list_files(repo, "main")
    except (OSError, ValueError, errors.HTTPError) as error:
        raise ValueError(
            f"hub:{repo}: cannot list its files ({(str(error).strip() or repr(error)).splitlines()[0]}); check the id "
            f"and the network, and for a gated data set ask for access at huggingface.co/datasets/{repo}, then "
            "`hf auth login`"
        ) from None
    for kind in (".parquet", ".tar"):
        chosen, configs = choose_files([file for file in files if file.endswith(kind)], config, split)
        if len(configs) > 1:
            raise ValueError(
                f"{source}: it has the configs {', '.join(configs)}; expected one, as in hub:{repo}/{configs[0]}"
            )
        if chosen:
            break
    else:
        shown = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise ValueError(f"{source}: expected .parquet or .tar files of that config and split, got only {shown}")
    prefix = f"hub:{repo}/"

    def local(name):
        for wait in (2, 10, 60, 300, None):  # s; a hub that is away for some minutes must not end a run of days
            try:
                return Path(huggingface_hub.hf_hub_download(repo, name.removeprefix(prefix), repo_type="dataset"))
            except (OSError, errors.HTTPError, errors.EntryNotFoundError) as error:
                gone = isinstance(error, errors.EntryNotFoundError | errors.RepositoryNotFoundError)
                gone = gone and not isinstance(error, errors.LocalEntryNotFoundError)
                why = f"{name}: cannot be downloaded: {(str(error).strip() or repr(error)).splitlines()[0]}"
                if wait is None or gone or constants.HF_HUB_OFFLINE:
                    raise RuntimeError(why) from None
            tqdm.write(f"{why}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)

    return [prefix + file for file in chosen], local


def _members(names, roles):
    """{stem: {role or "txt" or "json": name}} of the files of a tar or folder, in order of the names."""
    samples = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if os.path.basename(name).startswith("."):
            continue  # also what macOS puts into tars, ._17.jpg
        if suffix.lower() in PICTURES:
            kind = "image"
            for role in ("image", "source"):
                if stem.endswith("." + (roles[role] or role)):
                    stem, kind = stem.removesuffix("." + (roles[role] or role)), role
        elif suffix in (".txt", ".json"):
            kind = suffix[1:]
        else:
            continue
        samples.setdefault(stem, {})[kind] = name
    return samples


def _drop_sources(samples, roles, read):
    """Takes out the pictures without a text which the JSON of another sample names as its source. Only where there are
    such pictures are the JSONs read for it."""
    bare = {members["image"]: stem for stem, members in samples.items() if set(members) == {"image"}}
    for members in list(samples.values()) if bare else []:
        if "json" in members:
            try:
                source = _pick(json.loads(read(members["json"])), roles).get("source")
                samples.pop(bare.get(_relative(source, members["json"])), None)
            except (OSError, ValueError, RecursionError, TypeError, AttributeError):
                pass  # it is reported when its turn comes


def _relative(name, to):
    return os.path.normpath(os.path.join(os.path.dirname(to), name))


def _sample(members, roles, read, where):
    """Fields of a sample out of the members of one stem; read(name) -> bytes, KeyError where there is none."""
    fields = {}
    if "json" in members:
        try:
            data = json.loads(read(members["json"]))
        except (ValueError, RecursionError) as error:
            raise BadSample("prompt", f"{where}.json", f"expected a JSON object ({error})") from None
        if not isinstance(data, dict):
            raise BadSample("prompt", f"{where}.json", "expected a JSON object, got another value")
        fields = _pick(data, roles)
        fields.pop("image", None)  # the member of that name; elsewhere often an URL
        if "source" in members or not isinstance(fields.get("source"), str):
            fields.pop("source", None)
        else:
            name = _relative(fields["source"], members["json"])
            try:
                fields["source"] = read(name)
            except (KeyError, OSError):
                raise BadSample("image", f"{where}.json", f"its source {name} is not there") from None
    if "txt" in members and roles["prompt"] in (None, "txt"):
        fields["prompt"] = read(members["txt"])
    for role in ("image", "source"):
        if role in members:
            fields[role] = read(members[role])
    return fields


def _tar(path, name, roles):
    places, cut = {}, None
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep them all
                if member.isreg():
                    if member.offset_data + member.size > size:
                        cut = f"truncated within {member.name}"
                        break
                    places[os.path.normpath(member.name)] = member.offset_data, member.size
            if cut is None:  # tarfile ends in silence at a damaged header; an archive ends in zeros
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(512).strip(b"\0"):
                    cut = f"damaged after {len(places):,} members, at byte {tar.offset:,}"
    except (tarfile.TarError, OSError, EOFError) as error:
        cut = f"expected a whole tar ({error})"

    def read(member):
        offset, length = places[member]
        with open(path, "rb") as file:  # opened anew: safe in threads, and nothing to close
            file.seek(offset)
            return file.read(length)

    samples = _members(places, roles)
    _drop_sources(samples, roles, read)
    samples = list(samples.items())

    def fetch(entry):
        if entry == len(samples):
            raise BadSample("file", name, cut)
        stem, members = samples[entry]
        where = f"{name}:{stem}"
        return _sample(members, roles, read, where), f"{name}:{members.get('image', stem)}"

    return Shard(len(samples) + (cut is not None), fetch)


def _folder(path, name, roles):
    names = sorted(
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, files in os.walk(path, followlinks=True)
        for file in files
    )

    def read(member):
        return (path / member).read_bytes()

    samples = _members(names, roles)
    _drop_sources(samples, roles, read)
    samples = [(s, m) for s, m in samples.items() if "image" in m or "source" in m]  # a text alone is a README
    if not samples:
        raise ValueError(f"{name}: expected pictures, got none; for files of many give a glob, e.g. {name}/*.tar")

    def fetch(entry):
        stem, members = samples[entry]
        try:
            fields = _sample(members, roles, read, f"{path / stem}")
        except OSError as error:
            raise BadSample("file", f"{path / stem}", str(error)) from None
        return fields, str(path / members.get("image", stem))

    return Shard(len(samples), fetch)


def _lines(path, name, roles):
    starts, numbers, offset = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                starts.append(offset)
                numbers.append(number)
            offset += len(line)

    def fetch(entry):
        where = f"{name}:{numbers[entry]}"
        with open(path, "rb") as file:
            file.seek(starts[entry])
            line = file.readline()
        try:
            data = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadSample("prompt", where, f"expected a JSON object ({error})") from None
        if not isinstance(data, dict):
            raise BadSample("prompt", where, "expected a JSON object, got another value")
        fields = _pick(data, roles)
        return fields | {role: _beside(path, fields.get(role), where) for role in ("image", "source")}, where

    return Shard(len(starts), fetch)


def _parquet(path, name, roles):
    import pyarrow as pa  # only here: the other formats need no pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        why = f"expected a parquet file ({str(error).splitlines()[0]})"

        def broken(entry):
            raise BadSample("file", name, why)

        return Shard(1, broken)
    known = file.schema_arrow.names
    prompt = roles["prompt"] or next((column for column in PROMPTS if column in known), "prompt")
    columns = dict(prompt=prompt, **{role: roles[role] or role for role in ("image", "source", "answer")})
    for role, column in columns.items():
        if column not in known and (role in ("prompt", "image") or roles[role]):
            raise ValueError(
                f"{name}: expected a column {column!r} ({role}), got the columns {', '.join(known)}; name it as in "
                "#caption,image=COLUMN"
            )
    columns = {role: column for role, column in columns.items() if column in known}
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)], dtype=np.int64)
    lock, kept = Lock(), [None, None]  # the last row group

    def fetch(entry):
        where = f"{name}:{entry + 1}"
        group = int(np.searchsorted(ends, entry, side="right"))
        with lock:
            if kept[0] != group:
                try:
                    kept[:] = group, file.read_row_group(group, columns=sorted(set(columns.values())))
                except (pa.ArrowException, OSError) as error:
                    raise BadSample("file", where, f"row group {group}: {str(error).splitlines()[0]}") from None
            table = kept[1]
        first = int(ends[group - 1]) if group else 0
        row = table.slice(entry - first, 1).to_pylist()[0]
        fields = {role: row[column] for role, column in columns.items()}
        return fields | {role: _beside(path, fields.get(role), where) for role in ("image", "source")}, where

    return Shard(int(ends[-1]) if len(ends) else 0, fetch, groups=ends)


def _pick(data, roles):
    """The fields of a JSON object by role."""
    prompt = roles["prompt"] or next((name for name in PROMPTS if data.get(name) is not None), "prompt")
    names = dict(prompt=prompt, **{role: roles[role] or role for role in ("image", "source", "answer")})
    return {role: data[name] for role, name in names.items() if data.get(name) is not None}


def _beside(path, picture, where):
    """A picture of a row as bytes: those, a struct of bytes and path, or a path relative to the file."""
    if isinstance(picture, dict):
        picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    if isinstance(picture, str):
        try:
            return (path.parent / picture).read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample("image", where, f"cannot read {picture!r} ({error})") from None
    return picture


def _text(text, what, where):
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("prompt", where, f"expected {what} in UTF-8 ({error})") from None
    if not isinstance(text, str):
        raise BadSample("prompt", where, f"expected {what}, got {'none' if text is None else type(text).__name__}")
    if not text.strip():
        raise BadSample("prompt", where, f"expected {what}, got blank text")
    return text.strip()


def _picture(encoded, where):
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            width, height = opened.size
            if not 0 < width * height <= MAX_PIXELS:
                raise ValueError(f"it is {width} x {height}, expected 1 to {MAX_PIXELS:,} pixels")
            if opened.mode[0] in "IF":
                raise ValueError(f"it has the mode {opened.mode}, expected 8 bits a channel")
            return rgb(opened)
    except Exception as error:  # of any type: damaged data reach every line of every decoder
        raise BadSample("image", where, f"expected a picture that PIL can read ({error})") from None


def _background(function, *args):
    """Its result, as a Future; on a daemon thread, which does not hold up the end of the program."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future
