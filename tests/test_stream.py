import io
import json
import math
import re
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_prompts import hub

from data import stream as stream_data
from data.stream import Batches, Mixture, Stream, bucket, buckets, fit


def picture(colour=(0, 0, 0), size=(6, 4), kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members):
    """members: (name, bytes or str or a dict, which becomes JSON)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = json.dumps(content) if isinstance(content, dict) else content
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def numbered(first, last):
    """Members of samples whose prompt is p<i> and whose picture is of the colour (i, i // 256, 7)."""
    pairs = [[(f"{i:05d}.png", picture((i % 256, i // 256, 7))), (f"{i:05d}.txt", f"p{i}")] for i in range(first, last)]
    return [member for pair in pairs for member in pair]


def write_parquet(path, rows, row_group_size=None):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def prompts(rows):
    return [row["prompt"] for row in rows]


def epoch_of(stream, epoch=0):
    """The prompts of one epoch, from a new stream."""
    found = []
    while True:
        row = stream.next(1)[0]
        if row["at"][0] > epoch:
            return found
        if row["at"][0] == epoch:
            found.append(row["prompt"])


def shards(tmp_path, kind, sizes):
    """A source of that kind with files of those sizes, whose samples are p0, p1, ..."""
    first = 0
    for number, size in enumerate(sizes):
        name = tmp_path / f"{kind}{number}"
        if kind == "tar":
            write_tar(name.with_suffix(".tar"), numbered(first, first + size))
        elif kind == "folder":
            name.mkdir()
            for member, content in numbered(first, first + size):
                (name / member).write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            rows = [{"prompt": f"p{i}", "image": picture((i % 256, i // 256, 7))} for i in range(first, first + size)]
            if kind == "parquet":
                write_parquet(name.with_suffix(".parquet"), rows, row_group_size=4)
            else:
                for row in rows:
                    (tmp_path / f"{row['prompt']}.png").write_bytes(row["image"])
                lines = [json.dumps({"prompt": row["prompt"], "image": f"{row['prompt']}.png"}) for row in rows]
                name.with_suffix(".jsonl").write_text("\n\n".join(lines) + "\n")
        first += size
    return str(tmp_path / (f"{kind}*" if kind == "folder" else f"*.{kind}"))


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["tar", "folder", "parquet", "jsonl"])
def test_every_format_gives_the_same_samples(tmp_path, kind):
    rows = Stream(shards(tmp_path, kind, [5, 9]), seed=0).next(14)
    assert sorted(prompts(rows)) == sorted(f"p{i}" for i in range(14))
    for row in rows:
        number = int(row["prompt"][1:])
        assert row["image"].mode == "RGB" and row["image"].size == (6, 4)
        assert row["image"].getpixel((3, 2)) == (number, 0, 7)
        assert row["source"] is None and row["answer"] is None
        file, inside = divmod(number, 5) if number < 5 else (1, number - 5)
        expected = {
            "tar": f"{tmp_path}/tar{file}.tar:{number:05d}.png",
            "folder": f"{tmp_path}/folder{file}/{number:05d}.png",
            "parquet": f"{tmp_path}/parquet{file}.parquet:{inside + 1}",
            "jsonl": f"{tmp_path}/jsonl{file}.jsonl:{2 * inside + 1}",  # lines are counted with the blank ones
        }
        assert row["where"] == expected[kind]


def members_of(colour_of_source):
    return [
        ("a/1.2.json", {"caption": "by suffix", "answer": 7, "image": "http://nowhere"}),
        ("a/1.2.source.JPG", picture((9, 9, 9), kind="PNG")),
        ("a/1.2.webp", picture((200, 200, 200), kind="PNG")),
        ("a/2.txt", "the text first"),
        ("a/2.json", {"caption": "not this", "source": "../b/before.png"}),
        ("a/2.jpeg", picture((100, 100, 100))),
        ("b/before.png", picture(colour_of_source)),
        ("._junk.png", b"what macOS leaves"),
        ("b/labels.npy", b"other files are left alone"),
    ]


def test_tar_and_folder_have_sources_answers_and_json(tmp_path):
    path = write_tar(tmp_path / "x.tar", members_of((1, 2, 3)))
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    (tmp_path / "folder" / "README.txt").write_text("no sample")
    for source in (path, str(tmp_path / "folder")):
        stream = Stream(source, 0)
        rows = {row["prompt"]: row for row in stream.next(2)}
        assert set(rows) == {"by suffix", "the text first"} and stream.counts()["seen"] == 2
        first, second = rows["by suffix"], rows["the text first"]
        assert first["source"].getpixel((0, 0)) == (9, 9, 9) and first["image"].getpixel((0, 0)) == (200, 200, 200)
        assert first["answer"] == "7" and second["answer"] is None
        assert second["source"].getpixel((0, 0)) == (1, 2, 3) and second["image"].getpixel((0, 0)) == (100, 100, 100)
        assert set(prompts(Stream(f"{source}#caption", 0).next(2))) == {"by suffix", "not this"}


def test_names_of_columns_and_members(tmp_path):
    row = {"say": ["one", "two"], "after": {"bytes": picture((5, 5, 5)), "path": None}, "before": picture((6, 6, 6))}
    path = write_parquet(tmp_path / "x.parquet", [row | {"reply": "yes", "image": "unused"}] * 40)
    rows = Stream(f"{path}#say,image=after,source=before,answer=reply", 0).next(80)
    assert Counter(prompts(rows)).keys() == {"one", "two"} and Counter(prompts(rows))["one"] in range(20, 60)
    assert all(row["image"].getpixel((0, 0)) == (5, 5, 5) for row in rows)
    assert all(row["source"].getpixel((0, 0)) == (6, 6, 6) and row["answer"] == "yes" for row in rows)
    # an epoch draws its own text
    by_place = {}
    for row in rows:
        by_place.setdefault(row["at"][2], set()).add(row["prompt"])
    assert {len(texts) for texts in by_place.values()} == {1, 2}
    members = [("1.after.png", picture((5, 5, 5))), ("1.before.png", picture((6, 6, 6))), ("1.txt", "t")]
    row = Stream(write_tar(tmp_path / "x.tar", members) + "#image=after,source=before", 0).next(1)[0]
    assert row["image"].getpixel((0, 0)) == (5, 5, 5) and row["source"].getpixel((0, 0)) == (6, 6, 6)


def test_parquet_and_lines_take_paths(tmp_path):
    (tmp_path / "one.png").write_bytes(picture((1, 1, 1)))
    (tmp_path / "two.png").write_bytes(picture((2, 2, 2)))
    row = {"question": "what?", "image": {"bytes": None, "path": "one.png"}, "answer": "ink"}
    rows = Stream(write_parquet(tmp_path / "x.parquet", [row]), 0).next(1)
    (tmp_path / "x.jsonl").write_text('\ufeff{"text": "t", "image": "one.png", "source": "two.png"}')
    rows += Stream(str(tmp_path / "x.jsonl"), 0).next(1)
    assert [row["image"].getpixel((0, 0)) for row in rows] == [(1, 1, 1)] * 2
    assert prompts(rows) == ["what?", "t"] and rows[0]["answer"] == "ink" and rows[0]["source"] is None
    assert rows[1]["source"].getpixel((0, 0)) == (2, 2, 2)


def test_pictures_are_upright_rgb_on_white(tmp_path):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (8, 2), (0, 0, 9)).save(turned, "PNG", exif=exif)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    members = [("a.png", turned.getvalue()), ("a.txt", "turned"), ("b.png", clear.getvalue()), ("b.txt", "clear")]
    members += [("c.png", picture(77, mode="L")), ("c.txt", "grey")]
    rows = {row["prompt"]: row["image"] for row in Stream(write_tar(tmp_path / "x.tar", members), 0).next(3)}
    assert all(image.mode == "RGB" for image in rows.values())
    assert rows["turned"].size == (2, 8)
    assert rows["clear"].getpixel((0, 0)) == (255, 255, 255) and rows["grey"].getpixel((0, 0)) == (77, 77, 77)


def test_hub_reads_tars_and_parquet_of_its_cache(tmp_path, monkeypatch):
    folder = hub(tmp_path, monkeypatch, "some/pictures")
    for number in range(3):
        write_tar(folder / f"data_512/{number}.tar", numbered(10 * number, 10 * number + 4))
    write_tar(folder / "data_1024/0.tar", numbered(100, 103))
    rows = Stream("hub:some/pictures/data_512", 0).next(12)
    assert sorted(prompts(rows)) == sorted(f"p{10 * n + i}" for n in range(3) for i in range(4))
    assert {row["where"][:31] for row in rows} == {f"hub:some/pictures/data_512/{n}.ta" for n in range(3)}
    assert len(epoch_of(Stream("hub:some/pictures/*", 0))) == 15
    with pytest.raises(ValueError, match="it has the configs data_1024, data_512; expected one, as in hub:some/pic"):
        Stream("hub:some/pictures", 0)
    other = hub(tmp_path, monkeypatch, "some/rows") / "data"
    other.mkdir()
    for split in ("train", "test"):
        write_parquet(other / f"{split}-0.parquet", [{"caption": split, "image": picture()}])
    assert prompts(Stream("hub:some/rows", 0).next(1)) == ["train"]
    assert prompts(Stream("hub:some/rows:test#caption", 0).next(1)) == ["test"]
    with pytest.raises(
        ValueError, match=r"hub:some/rows:dev: expected .parquet or .tar files .* got only .*data/test-0"
    ):
        Stream("hub:some/rows:dev", 0)
    with pytest.raises(ValueError, match="hub:no/such: cannot list its files"):
        Stream("hub:no/such", 0)


def test_hub_file_that_cannot_be_had(tmp_path, monkeypatch):
    folder = hub(tmp_path, monkeypatch, "some/set")
    write_tar(folder / "a.tar", numbered(0, 2))
    stream = Stream("hub:some/set", 0)
    (folder / "a.tar").unlink()
    with pytest.raises(RuntimeError, match="^hub:some/set/a.tar: cannot be downloaded: "):
        stream.next(1)


def test_hub_that_is_away_is_asked_again(tmp_path, monkeypatch, capsys):
    folder, waits = hub(tmp_path, monkeypatch, "some/set"), []
    path = write_tar(folder / "a.tar", numbered(0, 2))
    stream = Stream("hub:some/set", 0)

    def download(repo, file, repo_type):
        if len(waits) < 3:
            raise ConnectionError("no route")
        return path

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("time.sleep", waits.append)
    assert len(stream.next(2)) == 2 and waits == [2, 10, 60]
    assert "hub:some/set/a.tar: cannot be downloaded: no route; trying again in 10 s" in capsys.readouterr().err
    waits.clear()
    monkeypatch.setattr("time.sleep", lambda wait: None)
    with pytest.raises(RuntimeError, match="^hub:some/set/a.tar: cannot be downloaded: no route"):
        Stream("hub:some/set", 0).next(1)


def test_next_file_is_opened_ahead(tmp_path):
    stream = Stream(shards(tmp_path, "tar", [3] * 6), 0, shuffle_buffer=2)
    order = stream._share(0)
    stream.next(1)
    number, future = stream.ahead
    assert number == order[1] and future.result(10).size == 3
    stream.next(3)
    assert stream.opened[order[1]] is future.result() and stream.ahead[0] == order[2]
    stream.next(14)
    assert len(stream.opened) <= 4


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "kind, sizes", [("tar", [7]), ("tar", [3, 1, 5, 4]), ("parquet", [9, 6]), ("jsonl", [5, 2, 6])]
)
def test_ranks_share_every_epoch(tmp_path, kind, sizes, world_size):
    source = shards(tmp_path, kind, sizes)
    orders = []
    for epoch in range(3):
        ranks = [epoch_of(Stream(source, 5, rank, world_size, shuffle_buffer=4), epoch) for rank in range(world_size)]
        assert sorted(sum(ranks, [])) == sorted(f"p{i}" for i in range(sum(sizes)))
        orders.append(ranks)
    assert orders[0] != orders[1] != orders[2]
    if len(sizes) < world_size:  # rows are dealt, evenly for each file
        assert all(max(map(len, ranks)) - min(map(len, ranks)) <= len(sizes) for ranks in orders)
    again = [epoch_of(Stream(source, 5, rank, world_size, shuffle_buffer=4)) for rank in range(world_size)]
    other = [epoch_of(Stream(source, 6, rank, world_size, shuffle_buffer=4)) for rank in range(world_size)]
    assert again == orders[0] and other != orders[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "kind, sizes", [("tar", [5]), ("folder", [4, 3]), ("parquet", [9, 2, 3]), ("jsonl", [3, 1, 4])]
)
def test_resumes_at_every_position(tmp_path, kind, sizes, world_size):
    source = shards(tmp_path, kind, sizes)
    for rank in range(world_size):

        def new(rank=rank):
            return Stream(source, 3, rank, world_size, shuffle_buffer=3, num_threads=1)

        stream, states, rows = new(), [], []
        for _ in range(2 * sum(sizes) + 1):
            states.append(json.loads(json.dumps(stream.state())))
            rows += stream.next(1)
        assert prompts(new().next(len(rows))) == prompts(rows)  # however many are asked for at once
        resumed = new()
        rows += stream.next(3)
        for position, state in enumerate(states):
            resumed.load_state(state)
            assert resumed.state() == state
            assert [row["at"] for row in resumed.next(4)] == [row["at"] for row in rows[position : position + 4]]


def test_blocks_mix_files_and_hold_no_more_than_asked(tmp_path):
    source = shards(tmp_path, "tar", [10] * 10)
    files = [row["at"][1] for row in Stream(source, 0, shuffle_buffer=100).next(100)]
    assert len(set(files[:20])) > 5  # of 10 files, 20 draws
    files = [row["at"][1] for row in Stream(source, 0, shuffle_buffer=1).next(100)]
    assert all(len(set(files[i : i + 10])) == 1 for i in range(0, 100, 10))
    stream = Stream(f"{tmp_path}/tar0.tar", 0, shuffle_buffer=5)
    rows = stream._rows(0, 0, 0, stream._open(0)).tolist()
    moves = [rows.index(row["at"][2]) for row in stream.next(10)]
    assert sorted(moves[:5]) == [0, 1, 2, 3, 4] and moves[:5] != [move - 5 for move in moves[5:]]


def test_parquet_reads_a_row_group_once_a_block(tmp_path, monkeypatch):
    source, read = shards(tmp_path, "parquet", [40]), Counter()  # groups of 4
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **k: (read.update([i]), original(self, i, **k))[1]
    )
    Stream(source, 0, shuffle_buffer=40).next(40)
    assert read == Counter({group: 1 for group in range(10)})


def test_more_ranks_than_samples_still_draw(tmp_path):
    source = shards(tmp_path, "tar", [2])
    drawn = [prompts(Stream(source, 0, rank, 5).next(6)) for rank in range(5)]
    assert all(set(rank) == {"p0", "p1"} for rank in drawn)
    for epoch in range(4):
        assert sorted(sum((epoch_of(Stream(source, 0, rank, 5), epoch) for rank in range(5)), [])) == ["p0", "p1"]


def test_state_of_another_stream_is_an_error(tmp_path):
    source = shards(tmp_path, "tar", [3, 3])
    stream = Stream(source, 1, 0, 2)
    state = stream.state()
    assert all(isinstance(value, int) for value in state.values()) and json.loads(json.dumps(state)) == state
    for other in (
        Stream(source, 2, 0, 2),
        Stream(source, 1, 1, 2),
        Stream(source, 1, 0, 1),
        Stream(source, 1, 0, 2, 9),
    ):
        with pytest.raises(ValueError, match="the data state is of (seed 1|rank 0|world_size 2|shuffle_buffer 1000), "):
            other.load_state(state)
    (tmp_path / "tar1.tar").rename(tmp_path / "tar9.tar")
    with pytest.raises(ValueError, match="data state is of files"):
        Stream(source, 1, 0, 2).load_state(state)


# ------------------------------------------------------------------------------------------------------------ bad data


def bomb(width, height):
    """A PNG that says it is of that size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


BAD = {
    "cut": (picture((1, 2, 3), (64, 64), "JPEG")[:-300], "t", "cut.png: expected a picture that PIL can read"),
    "text": (b"<html>404</html>", "t", "text.png: expected a picture that PIL can read"),
    "empty": (b"", "t", "empty.png: expected a picture that PIL can read"),
    "zero": (bomb(0, 5), "t", "zero.png: expected a picture that PIL can read"),
    "bomb": (bomb(9000, 9000), "t", "bomb.png: .* 9000 x 9000, expected 1 to 67,108,864 pixels"),
    "bigbomb": (bomb(60000, 60000), "t", "bigbomb.png: expected a picture that PIL can read"),
    "depth": (picture(40000, mode="I;16"), "t", "depth.png: .* mode I;16, expected 8 bits a channel"),
    "alone": (picture(), None, "alone.png: expected a prompt, got none"),
    "blank": (picture(), " \n", "blank.png: expected a prompt, got blank text"),
    "latin": (picture(), b"na\xefve", "latin.png: expected a prompt in UTF-8"),
    "unseen": (None, "t", "unseen: expected a picture, got none"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_samples_of_a_tar_are_skipped_counted_and_named(tmp_path, capsys, name):
    content, text, message = BAD[name]
    bad = [(f"{name}.png", content)] * (content is not None) + [(f"{name}.txt", text)] * (text is not None)
    stream = Stream(write_tar(tmp_path / "x.tar", bad + numbered(0, 5)), 0)
    assert sorted(epoch_of(stream)) == [f"p{i}" for i in range(5)]
    kind = "prompt" if name in ("alone", "blank", "latin") else "image"
    counts = stream.counts()  # the bad one of the next epoch may have been seen already
    assert counts[f"bad_{kind}"] in (1, 2) and sum(counts.values()) == counts["seen"] + counts[f"bad_{kind}"]
    assert counts["seen"] == 6 + counts[f"bad_{kind}"]
    assert re.search(f"skipped {tmp_path}/x.tar:{message}", capsys.readouterr().err)
    resumed = Stream(str(tmp_path / "x.tar"), 0)
    resumed.load_state(stream.state())
    assert resumed.counts() == counts


def test_bad_tars_are_read_as_far_as_they_go(tmp_path, capsys):
    whole = (write_tar(tmp_path / "x.tar", numbered(0, 8)), (tmp_path / "x.tar").read_bytes())[1]
    header = whole.index(b"00005.png")
    cases = {
        "within": (whole[: header + 512 + 20], 5, "truncated within 00005.png"),
        "header": (whole[: header + 100], 5, f"damaged after 10 members, at byte {header:,}"),
        "damaged": (whole[:header] + b"\xff" * 512 + whole[header + 512 :], 5, "damaged after 10 members"),
        "nothing": (b"", 0, "expected a whole tar"),
        "html": (b"<html>" * 1000, 0, "expected a whole tar"),
        "gzip": (b"\x1f\x8b" + b"\0" * 2000, 0, "expected a whole tar"),
    }
    for name, (content, good, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.tar").write_bytes(content)
        write_tar(folder / "b.tar", numbered(100, 102))
        stream = Stream(f"{folder}/*.tar", 0)
        assert sorted(epoch_of(stream)) == sorted([f"p{i}" for i in range(good)] + ["p100", "p101"]), name
        assert stream.counts()["bad_file"] >= 1
        assert f"skipped {folder}/a.tar: {message}" in capsys.readouterr().err


def test_bad_lines_and_rows_are_named(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture())
    good = '{"prompt": "good", "image": "a.png"}'
    bad = [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object, got another value"),
        ('{"image": "a.png"}', "expected a prompt, got none"),
        ('{"prompt": 3, "image": "a.png"}', "expected a prompt, got int"),
        ('{"prompt": "x"}', "expected a picture, got none"),
        ('{"prompt": "x", "image": "b.png"}', "cannot read 'b.png'"),
        ('{"prompt": "x", "image": 5}', "expected a picture that PIL can read"),
        ('{"prompt": "x", "image": "a.png", "source": "b.png"}', "cannot read 'b.png'"),
        ('{"prompt": "x", "image": "a.png", "answer": [1]}', "expected an answer, got list"),
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([good] + [line for line, _ in bad]))
    assert epoch_of(Stream(str(tmp_path / "x.jsonl"), 0)) == ["good"]
    error = capsys.readouterr().err
    for number, (_, message) in enumerate(bad, 2):
        assert f"skipped {tmp_path}/x.jsonl:{number}: {message}" in error
    rows = [{"prompt": "good", "image": picture()}, {"prompt": None, "image": picture()}, {"prompt": "x", "image": b""}]
    stream = Stream(write_parquet(tmp_path / "x.parquet", rows + [{"prompt": "x", "image": None}], 2), 0)
    assert epoch_of(stream) == ["good"]
    error = capsys.readouterr().err
    for row, message in (
        (2, "expected a prompt, got none"),
        (3, "expected a picture that"),
        (4, "expected a picture, got"),
    ):
        assert f"skipped {tmp_path}/x.parquet:{row}: {message}" in error


def test_bad_parquet_files_and_row_groups(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"p{i}", "image": picture() + rng.bytes(500)} for i in range(8)]
    content = bytearray((write_parquet(tmp_path / "a.parquet", rows, 4), (tmp_path / "a.parquet").read_bytes())[1])
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1).file_offset
    start = start or pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(content)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    stream = Stream(f"{tmp_path}/*.parquet", 0)
    assert sorted(epoch_of(stream)) == ["p0", "p1", "p2", "p3"]
    error = capsys.readouterr().err
    assert f"skipped {tmp_path}/b.parquet: expected a parquet file" in error
    assert all(f"skipped {tmp_path}/a.parquet:{row}: row group 1" in error for row in (5, 6, 7, 8))
    assert "a.parquet:4" not in error and stream.counts()["bad_file"] >= 5


def test_the_first_twenty_bad_stop_the_run(tmp_path):
    members = [(f"{i:03d}.png", picture()) for i in range(50)]
    stream = Stream(write_tar(tmp_path / "x.tar", members), 0)
    with pytest.raises(ValueError, match=r"x.tar: the first 20 samples are all bad, the last one: .*png: expected a p"):
        stream.next(1)
    assert stream.counts() == dict(seen=20, bad_image=0, bad_prompt=20, bad_file=0)
    broken = tmp_path / "y.tar"
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="first 20 samples are all bad"):  # one sample an epoch
        Stream(str(broken), 0).next(1)


def test_too_large_a_bad_share_stops_the_run(tmp_path, capsys):
    members = numbered(0, 198) + [("bad1.txt", "t"), ("bad2.png", picture())]
    source = write_tar(tmp_path / "x.tar", members)
    stream = Stream(source, 0, max_bad=0.0125)
    assert len(stream.next(5 * 198 + 1)) == 991  # five epochs with ten bad samples and the beginning of another
    counts = stream.counts()
    assert counts["seen"] == 991 + counts["bad_image"] + counts["bad_prompt"] and counts["bad_file"] == 0
    assert counts["bad_image"] in (5, 6) and counts["bad_prompt"] in (5, 6)
    strict = Stream(source, 0, max_bad=0.0099)
    with pytest.raises(
        ValueError, match=r"x.tar: \d+ of 1,0\d\d samples are bad \(5 bad_image, 5 bad_prompt\), more t"
    ):
        strict.next(1200)
    strict = Stream(source, 0, max_bad=0.0099)
    assert len(strict.next(900)) == 900  # fewer than 1,000 are not judged
    resumed = Stream(source, 0, max_bad=0.0099)  # and the count goes on
    resumed.load_state(strict.state())
    with pytest.raises(ValueError, match="samples are bad"):
        resumed.next(200)


# -------------------------------------------------------------------------------------------------------------- errors


def test_source_errors_name_what_is_wrong(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "x", "jpg": picture()}])
    for source, kind, message in (
        (tmp_path / "a.csv", ValueError, "unknown kind of data '.csv'; known: "),
        (tmp_path / "b.tar", FileNotFoundError, "b.tar: no such file or folder; expected "),
        (f"{tmp_path}/*.tar", FileNotFoundError, r"\*.tar: no file matches"),
        (f"{path}#prompt,picture=jpg", ValueError, "expected #prompt or more of .*, got 'picture=jpg'"),
        (f"{path}#", ValueError, "expected #prompt or more of .*, got ''"),
        (f"{path}#a,b", ValueError, "expected #prompt or more of .*, got 'b'"),
        ("hub:name", ValueError, "expected hub:owner/name or more of .*, got hub:name"),
    ):
        with pytest.raises(kind, match=message):
            Stream(source, 0)
    for source, message in (
        (tmp_path / "empty", "empty: expected pictures, got none; for files of many give a glob"),
        (tmp_path / "empty.jsonl", "expected samples in .*empty.jsonl, got none"),
        (path, "a.parquet: expected a column 'image' .image., got the columns prompt, jpg; name it as in #caption"),
        (f"{path}#text", "a.parquet: expected a column 'text' .prompt."),
        (f"{path}#prompt,image=jpg,source=old", "a.parquet: expected a column 'old' .source."),
    ):
        with pytest.raises(ValueError, match=message):
            Stream(source, 0).next(1)
    assert prompts(Stream(f"{path}#image=jpg", 0).next(1)) == ["x"]
    for nonsense in (dict(rank=2, world_size=2), dict(shuffle_buffer=0), dict(max_bad=2)):
        with pytest.raises(ValueError, match="expected 0 <= rank < world_size"):
            Stream(path, 0, **nonsense)


def test_named_roles_are_required(tmp_path, capsys):
    members = numbered(0, 2) + [("00000.source.png", picture()), ("00000.json", {"answer": "a"})]
    source = write_tar(tmp_path / "x.tar", members)
    assert len(epoch_of(Stream(source, 0))) == 2
    assert epoch_of(Stream(f"{source}#source=source", 0)) == epoch_of(Stream(f"{source}#answer=answer", 0)) == ["p0"]
    error = capsys.readouterr().err
    assert "x.tar:00001.png: expected a picture 'source', got none" in error and "expected an answer, got none" in error


# ------------------------------------------------------------------------------------------------------------- mixture


def test_mixture_draws_by_weight(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    sources = shards(one, "tar", [10]), shards(two, "tar", [7])

    def new(seed=0, rank=0):
        return Mixture([(Stream(source, 1, rank, 2, num_threads=1), w) for source, w in zip(sources, (3, 1))], seed)

    chosen = np.array([row["at"][0] for row in new().next(4000)])
    # 1,000 of 4,000 expected, 4.5 standard deviations of 27.4
    assert abs(chosen.sum() - 1000) < 123
    # no memory from one draw to the next: pairs as often as independent draws make them
    assert abs((chosen[1:] * chosen[:-1]).sum() - 250) < 5 * 15
    rest = [[row["at"][0] for row in new(seed, rank).next(50)] for seed, rank in ((0, 0), (1, 0), (0, 1))]
    assert rest[0] == chosen[:50].tolist() and rest[0] != rest[1] and rest[0] != rest[2]
    # each stream goes on as if it were alone
    alone = prompts(Stream(sources[1], 1, 0, 2).next(20))
    assert [r["prompt"] for r in new().next(200) if r["at"][0] == 1][:20] == alone


def test_mixture_resumes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    sources = shards(one, "tar", [5]), shards(two, "parquet", [7])

    def new():
        return Mixture([(Stream(source, 1, shuffle_buffer=3), w) for source, w in zip(sources, (2, 1))], 0)

    mixture, states, ats = new(), [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(mixture.state())))
        ats += [row["at"] for row in mixture.next(1)]
    assert [row["at"] for row in new().next(30)] == ats
    resumed = new()
    for position in range(25):
        resumed.load_state(states[position])
        assert [row["at"] for row in resumed.next(5)] == ats[position : position + 5]
    row = resumed.read(ats[3])
    assert row["at"] == ats[3] and resumed.counts()["seen"] == 30 - 1
    with pytest.raises(ValueError, match="expected streams with weights > 0"):
        Mixture([(Stream(sources[0], 0), 0)], 0)
    with pytest.raises(ValueError, match="data state is of 2 streams, got 1"):
        Mixture([(Stream(sources[0], 1), 1)], 0).load_state(states[0])


# ------------------------------------------------------------------------------------------------------------- buckets


def test_buckets_have_about_the_area():
    # sides of round(sqrt(2^18 * ratio) / 16) * 16, by hand
    assert buckets(512 * 512, 16) == [
        *[(512, 512), (464, 576), (576, 464), (448, 592), (592, 448), (416, 624), (624, 416)],
        *[(384, 688), (688, 384), (368, 720), (720, 368)],
    ]
    for area, multiple in ((512**2, 32), (1024**2, 16), (1024**2, 64), (768**2, 32)):
        for height, width in buckets(area, multiple):
            assert height % multiple == width % multiple == 0 and abs(height * width / area - 1) < 0.12
    assert buckets(32 * 32, 32) == [(32, 32)]  # 2:1 is 45 x 23: 32 x 32 again
    with pytest.raises(ValueError, match="area >= multiple"):
        buckets(100, 16)


def test_bucket_is_the_nearest_aspect_ratio():
    def of(width, height):
        return bucket(width, height, 1024**2, 64)

    assert of(10, 10) == (1024, 1024) and of(1920, 1080) == (768, 1344) and of(1080, 1920) == (1344, 768)
    assert of(9999, 10) == (704, 1472) and of(10, 9999) == (1472, 704)
    for width, height in np.random.default_rng(0).integers(1, 4000, (200, 2)).tolist():
        chosen = of(width, height)
        assert of(height, width) == chosen[::-1]
        apart = {s: abs(math.log(s[1] / s[0] / (width / height))) for s in buckets(1024**2, 64)}
        assert apart[chosen] == pytest.approx(min(apart.values()), abs=1e-12)


def test_fit_cuts_around_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 3), np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(pixels), (4, 4))), pixels[:, 3:7])
    assert np.array_equal(np.asarray(fit(Image.fromarray(pixels), (4, 10))), pixels)
    board = Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8))
    grey = np.asarray(fit(board, (16, 16)), int)
    assert grey.shape == (16, 16, 3) and abs(grey - 127.5).max() < 13  # antialiased


def shaped(tmp_path, sizes, name="x.tar", extra=()):
    members = [(f"{i:05d}.png", picture((i % 256, i // 256, 0), size)) for i, size in enumerate(sizes)]
    return write_tar(tmp_path / name, members + [(f"{i:05d}.txt", f"p{i}") for i in range(len(sizes))] + list(extra))


SQUARE, WIDE, TALL = (64, 64), (96, 48), (48, 96)  # width, height
AREA = dict(area=64 * 64, multiple=16)


def test_batches_have_one_size_and_lose_nothing(tmp_path):
    source = shaped(tmp_path, [SQUARE, WIDE, TALL] * 12)
    batches = Batches(Stream(source, 0), 4, **AREA)
    seen = []
    for _ in range(60):
        batch = batches.next()
        assert len(batch) == 4
        (size,) = {row["image"].size for row in batch}
        for row in batch:
            shape = int(row["prompt"][1:]) % 3
            assert size == ((64, 64), (96, 48), (48, 96))[shape]
            seen.append(tuple(row["at"]))
    waiting = [tuple(row["at"]) for row in Stream(source, 0).next(batches.state()["drawn"])]
    left = [tuple(item[3:]) for item in batches.state()["waiting"]]
    assert len(set(seen)) == 240 and sorted(seen + left) == sorted(waiting)


def kinds(tmp_path):
    """Squares and some wide ones, a fifth of them to be edited; one tall one, ever so rarely."""
    sizes = [WIDE if i % 4 == 0 else SQUARE for i in range(39)] + [TALL]
    return shaped(tmp_path, sizes, extra=[(f"{i:05d}.source.png", picture(size=WIDE)) for i in range(0, 40, 5)])


def test_batches_resume_at_every_position(tmp_path):
    source = kinds(tmp_path)

    def new():
        return Batches(Mixture([(Stream(source, 0, shuffle_buffer=7), 1)], 0), 3, patience=2, **AREA)

    def seen(batch):
        return [
            (row["at"], row["image"].size, row["image"].tobytes(), row["source"] and row["source"].size)
            for row in batch
        ]

    batches, states, drawn = new(), [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(batches.state())))
        drawn.append(seen(batches.next()))
    assert max(len(state["waiting"]) for state in states) > 5
    resumed = new()
    for position in range(0, 37):
        resumed.load_state(states[position])
        assert resumed.state() == states[position]
        assert [seen(resumed.next()) for _ in range(3)] == drawn[position : position + 3]
    for batch in drawn:
        assert len({(size, source) for _, size, _, source in batch}) == 1
        assert {source for *_, source in batch} in ({None}, {batch[0][1]})
    with pytest.raises(ValueError, match="data state is of batch_size 3, got 4"):
        Batches(Mixture([(Stream(source, 0), 1)], 0), 4, **AREA).load_state(states[0])


def test_a_rare_shape_does_not_wait_for_ever(tmp_path):
    """One tall picture of 40 and batches of 8: alone it would wait for 8 epochs, with patience 2 for about 16 draws."""
    source = shaped(tmp_path, [WIDE] * 13 + [SQUARE] * 26 + [TALL])
    batches = Batches(Stream(source, 0), 8, patience=2, **AREA)
    order = {tuple(row["at"]): number for number, row in enumerate(Stream(source, 0).next(2000))}
    talls = []
    for number in range(150):
        batch = batches.next()
        (size,) = {row["image"].size for row in batch}
        oldest = min(order[tuple(row["at"])] for row in batch)
        assert 8 * (number + 1) + len(batches.state()["waiting"]) == batches.state()["drawn"]
        assert batches.state()["drawn"] - oldest <= 2 * 8 + 2 * Batches.CHUNK + 8
        for row in batch:
            if row["prompt"] == "p39":
                talls.append(size)
                # recut from the file, not from the fitted picture: all of one colour, and of the batch's size
                assert row["image"].getpixel((size[0] // 2, size[1] // 2)) == (39, 0, 0)
    assert len(talls) >= 25 and set(talls) == {(64, 64)}  # the median of a batch of a tall one and squares
    patient = Batches(Stream(source, 0), 8, patience=1000, **AREA)
    sizes = [patient.next()[0]["image"].size for _ in range(60)]
    assert sizes.count((48, 96)) <= 1


def test_recut_pictures_come_from_the_file(tmp_path):
    """A wide picture that joins squares is cut from what it was, not from what was made of it for its own bucket."""
    pixels, wide = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(wide, "PNG")
    squares = [(f"{i}.png", picture((9, 9, 9), SQUARE)) for i in range(20)] + [(f"{i}.txt", "s") for i in range(20)]
    members = [("wide.png", wide.getvalue()), ("wide.txt", "wide"), *squares]
    batches = Batches(Stream(write_tar(tmp_path / "x.tar", members), 0), 4, patience=1, **AREA)
    found = [row for _ in range(30) for row in batches.next() if row["prompt"] == "wide"]
    expected = fit(Image.fromarray(pixels), (64, 64))
    assert len(found) > 2 and all(row["image"].tobytes() == expected.tobytes() for row in found)
    assert fit(fit(Image.fromarray(pixels), (48, 96)), (64, 64)).tobytes() != expected.tobytes()


def test_batches_pass_on_errors_and_counts(tmp_path):
    members = [(f"{i:03d}.png", picture()) for i in range(30)]
    batches = Batches(Stream(write_tar(tmp_path / "x.tar", members), 0), 2, **AREA)
    for _ in range(2):
        with pytest.raises(ValueError, match="first 20 samples are all bad"):
            batches.next()
    # Counted is what has been delivered, so that a resumed run goes on with the same numbers.
    assert batches.stream.counts()["bad_prompt"] == 20 and batches.counts()["seen"] == 0
    with pytest.raises(ValueError, match="batch_size and patience >= 1"):
        Batches(batches.stream, 0, **AREA)


def test_limits_are_as_documented():
    assert (stream_data.FIRST_BAD, stream_data.ENOUGH, stream_data.MAX_PIXELS) == (20, 1000, 8192**2)
