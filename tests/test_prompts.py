import hashlib
import io
import json
import re
from collections import Counter

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import make_prompts
from data.prompts import choose_files, images, load, order, rgb

DATA = make_prompts.FOLDER
FILES = ["scenes.txt", "ocr.txt", "geneval_train.jsonl", "edits.jsonl"]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def png(colour, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def rows_to_file(folder, suffix, rows):
    path = folder / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def hub(folder, monkeypatch, name):
    """The folder of a data set's files in the hub's cache, in its own layout, with no connection to more."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repo, commit = folder / f"datasets--{name.replace('/', '--')}", "0" * 40
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name, content, line, message",
    [
        ("a.txt", b"fine\nna\xefve\n", 2, "expected UTF-8 text, got byte 0xef at column 3"),
        ("a.jsonl", b'{"prompt": "fine"}\n\n{"prompt": \xff}\n', 3, "expected UTF-8 text, got byte 0xff"),
        ("a.jsonl", b'{"prompt": "fine"}\n{"prompt": \n', 2, "expected a JSON object, got {"),
        ("a.jsonl", b'["prompt"]\n', 1, 'expected a JSON object, got ["prompt"]'),
        ("a.jsonl", b"[" * 100_000, 1, "expected a JSON object"),
        ("a.jsonl", b'{"text": "a dog"}\n', 1, 'expected a key "prompt", "question" or "problem", got only [\'text\']'),
        ("a.jsonl", b'{"question": "x", "answer": 1}\n{"question": "y", "hint": ""}\n', 2, "got only ['hint']"),
        ("a.jsonl", b'{"problem": "x", "answer": null}\n', 1, 'expected "answer" or "solution" beside "problem"'),
        ("a.jsonl", b'{"question": "x", "answer": [1]}\n', 1, 'beside "question" to be text or a number, got [1]'),
        ("a.jsonl", b'{"question": "x", "answer": true}\n', 1, "to be text or a number, got True"),
        ("a.jsonl", b'{"question": "x", "answer": NaN}\n', 1, "to be text or a number, got nan"),
        ("a.jsonl", b'{"question": "x", "answer": " ", "solution": "2"}\n', 1, "to be text or a number, got ' '"),
        ("a.jsonl", b'{"prompt": [{"role": "user"}], "answer": 1}\n', 1, "chat messages are not supported"),
        ("a.jsonl", b'{"prompt": 3}\n', 1, "expected the prompt to be text, got 3"),
        ("a.jsonl", b'{"prompt": null}\n', 1, "expected the prompt to be text, got None"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": " \\n\\u3000"}\n', 2, "expected a prompt, got blank text"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', 1, "lone surrogate"),
        ("a.jsonl", b'{"prompt": "x", "image": 7}\n', 1, "expected `image` to be a path"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "y", "image": "no.png"}', 2, "no.png, which does not exist"),
    ],
)
def test_malformed_line_is_named(tmp_path, name, content, line, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:{line}: expected ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("a.txt", ""), ("a.txt", " \n\n\t\n"), ("a.jsonl", ""), ("a.jsonl", "\n")])
def test_empty_file_is_an_error(tmp_path, name, content):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=re.escape(path) + ": expected at least one prompt, got an empty file"):
        load(path)


def test_wrong_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'\.csv'; known: \.txt .*\.jsonl .*\.parquet, hub:.*#column, shapes"):
        load(write(tmp_path, "a.csv", "x"))
    with pytest.raises(FileNotFoundError, match="missing.txt: no such file"):
        load(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match='expected split "train", "eval" or "all", got \'test\''):
        load(DATA / "ocr.txt", split="test")
    for source in ("hub:name", "hub:owner/", "hub:owner/name#", "hub:owner/name:#text", "hub:owner/name/config:"):
        with pytest.raises(ValueError, match=f"expected hub:owner/name or .*, got {source}$"):
            load(source)


def test_hub_offline_error_names_the_id_and_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"hub:nobody/nothing: .*hf auth login") as error:
        load("hub:nobody/nothing#caption")
    assert "\n" not in str(error.value)


def test_empty_split_says_how_to_fix(tmp_path):
    path = write(tmp_path, "a.txt", "one\ntwo\n")
    with pytest.raises(ValueError, match=r"the eval split is empty.*--eval-prompts"):
        load(path, "eval", held_out=0)
    with pytest.raises(ValueError, match=r"the train split is empty.*--eval-prompts"):
        load(path, "train", held_out=1)
    with pytest.raises(ValueError, match=r"the train split is empty, all of its prompts are also in"):
        load(path, "train", eval_source=path)


# ------------------------------------------------------------------------------------------------------------- reading


def test_text_lines_keep_order_and_skip_blanks(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbf first\r\n\r\n  \n\xc3\xbcber \xe9\xbe\x8d\n\xe3\x80\x80\nlast")
    prompts = load(path, "all")
    assert [prompts[i]["prompt"] for i in range(len(prompts))] == ["first", "über 龍", "last"]
    assert prompts[-1] == {"prompt": "last", "metadata": {}, "image": None}
    with pytest.raises(IndexError):
        prompts[3]


def test_pictures_of_every_kind_become_what_one_sees(tmp_path):
    def shown(image):
        image.save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as opened:
            return np.asarray(rgb(opened))

    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert (shown(Image.fromarray(grey)) == np.arange(256).reshape(16, 16, 1)).all()
    color = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    assert (shown(Image.fromarray(color)) == color).all()
    alpha = np.zeros((5, 7, 1), np.uint8)
    alpha[2:] = 255
    seen = shown(Image.fromarray(np.concatenate([color, alpha], axis=2)))
    assert (seen[:2] == 255).all() and (seen[2:] == color[2:]).all()
    assert (shown(Image.fromarray(color[:, :, 0])) == color[:, :, :1]).all()
    bit = Image.fromarray(color[:, :, 0] > 127)
    assert (shown(bit) == np.where(color[:, :, :1] > 127, 255, 0)).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 1
    assert shown(palette).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_jsonl_metadata_and_image(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png((255, 0, 0, 128), "RGBA"))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    lines = [
        {"prompt": " a dog ", "tag": "counting", "include": [{"class": "dog", "count": 2}]},
        {"prompt": "make it blue", "image": "pictures/a.png", "caption": "red"},
        {"prompt": "broken", "image": "b.png"},
    ]
    prompts = load(write(tmp_path, "a.jsonl", json.dumps(lines[0])), "all")
    assert prompts[0] == {"prompt": "a dog", "metadata": {k: lines[0][k] for k in ("tag", "include")}, "image": None}
    prompts = load(write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, lines[1:]))), "all")
    assert prompts[0]["metadata"] == {"caption": "red"}
    assert prompts[0]["image"].mode == "RGB" and prompts[0]["image"].size == (3, 2)
    assert prompts[0]["image"].getpixel((2, 1)) == (255, 127, 127)  # half of it is the white behind it
    with pytest.raises(ValueError, match="b.jsonl.*expected an image that PIL can read"):  # decoded on access only
        prompts[1]


def test_random_access_equals_sequential(tmp_path):
    texts = [f"prompt {i} " + "é" * (i % 7) for i in range(2000)]
    prompts = load(write(tmp_path, "a.txt", "\n\n".join(texts)), "all")
    assert prompts.rows.dtype == np.int64 and prompts.rows.nbytes == 8 * len(prompts)  # all that is kept
    for i in np.random.default_rng(0).permutation(2000):
        assert prompts[i]["prompt"] == texts[i].strip()


def test_parquet_round_trip(tmp_path):
    colours = [(i, 2 * i, 3 * i) for i in range(10)]
    pictures = [{"bytes": png(c), "path": None} for c in colours]
    pictures[4] = None
    (tmp_path / "five.png").write_bytes(png((9, 9, 9)))
    pictures[5] = {"bytes": None, "path": "five.png"}
    table = pa.table(
        {
            "prompt": [f"p{i}" for i in range(10)],
            "image": pictures,
            "score": [i / 2 for i in range(10)],
            "label": pa.array(list("ababababab")).dictionary_encode(),
            "nested": [[i] for i in range(10)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    prompts = load(tmp_path / "a.parquet", "all")
    for i in [9, 0, 5, 3, 2, 4, 8, 1, 7, 6]:
        item = prompts[i]
        assert item["prompt"] == f"p{i}" and item["metadata"] == {"score": i / 2, "label": "ab"[i % 2]}
        expected = {4: None, 5: (9, 9, 9)}.get(i, colours[i])
        assert (item["image"] and item["image"].getpixel((0, 0))) == expected
    table = table.set_column(1, "image", pa.array([p and p["bytes"] for p in pictures[:5]] * 2))  # plain bytes
    pq.write_table(table, tmp_path / "b.parquet")
    assert load(tmp_path / "b.parquet", "all")[8]["image"].getpixel((0, 0)) == colours[3]


def test_parquet_errors(tmp_path):
    pq.write_table(pa.table({"caption": ["x"], "size": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: expected a column 'prompt', .*got the columns caption, size"):
        load(tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["x", "y", " ", "z"]}), tmp_path / "b.parquet", row_group_size=2)
    with pytest.raises(ValueError, match="b.parquet:3: expected a prompt, got blank text"):
        load(tmp_path / "b.parquet")
    pq.write_table(pa.table({"prompt": ["x", None]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet:2: expected the prompt to be text, got None"):
        load(tmp_path / "c.parquet")
    pq.write_table(pa.table({"prompt": [1]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="d.parquet: expected text in column 'prompt', got int64"):
        load(tmp_path / "d.parquet")
    pq.write_table(pa.table({"prompt": ["x"], "image": ["x.png"]}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="e.parquet: expected bytes or a struct.* got string"):
        load(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="f.parquet: expected a parquet file"):
        load(write(tmp_path, "f.parquet", "PAR"))
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "g.parquet")
    with pytest.raises(ValueError, match="g.parquet: expected at least one prompt"):
        load(tmp_path / "g.parquet")


def test_hub_reads_cached_train_files(tmp_path, monkeypatch):
    """Two train files are one set, the test file stays out."""
    folder = hub(tmp_path, monkeypatch, "some/set") / "data"
    folder.mkdir()
    for name, texts in {"train-0": ["a", "b"], "train-1": ["c"], "test-0": ["d"]}.items():
        pq.write_table(pa.table({"caption": texts, "id": [name] * len(texts)}), folder / f"{name}.parquet")
    prompts = load("hub:some/set#caption", "all")
    assert [(prompts[i]["prompt"], prompts[i]["metadata"]["id"]) for i in range(len(prompts))] == [
        ("a", "train-0"),
        ("b", "train-0"),
        ("c", "train-1"),
    ]
    with pytest.raises(ValueError, match="expected a column 'text', got the columns caption, id"):
        load("hub:some/set#text")


def test_hub_chooses_config_and_split(tmp_path, monkeypatch):
    """The layout of openai/gsm8k: two configs, each with train and test."""
    folder = hub(tmp_path, monkeypatch, "openai/gsm8k")
    for config in ("main", "socratic"):
        (folder / config).mkdir()
        for split in ("train", "test"):
            table = {"question": [f"{config} {split} {i}" for i in range(2)], "answer": ["2+2\n#### 4", "#### 5"]}
            pq.write_table(pa.table(table), folder / config / f"{split}-00000-of-00001.parquet")
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            expected = [f"{config} {split} {i}" for i in range(2)]
            assert texts_of(load(f"hub:openai/gsm8k/{config}:{split}", "all")) == expected
        assert texts_of(load(f"hub:openai/gsm8k/{config}", "all")) == [f"{config} train {i}" for i in range(2)]
    assert texts_of(load("hub:openai/gsm8k/*:test#answer", "all")) == ["2+2\n#### 4", "#### 5"] * 2
    assert load("hub:openai/gsm8k/main", "all")[0]["metadata"] == {"answer": "2+2\n#### 4"}
    for source in ("hub:openai/gsm8k", "hub:openai/gsm8k:test", "hub:openai/gsm8k#question"):
        with pytest.raises(ValueError, match=f"{source}: it has the configs main, socratic; expected one, as in hub:"):
            load(source)
    with pytest.raises(ValueError, match="hub:openai/gsm8k: cannot get its parquet.*not in the local cache"):
        load("hub:openai/gsm8k/main:validation")
    # What an earlier download did not get is known to be missing where huggingface_hub keeps the list (since 2).
    names = [f"main/train-0000{i}-of-00002.parquet" for i in range(2)] + ["other/train.parquet"]
    for name in names[:1] + names[2:]:
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"question": ["q"], "answer": [1]}), folder / name)
    (folder.parents[1] / "trees").mkdir()
    tree = {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0" * 40} for name in names}}
    (folder.parents[1] / "trees" / f"{folder.name}.json").write_text(json.dumps(tree))
    assert texts_of(load("hub:openai/gsm8k/other", "all")) == ["q"]
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        with pytest.raises(ValueError, match="not in the local cache, and no connection"):
            load("hub:openai/gsm8k/main")


def test_hub_reads_json_lines(tmp_path, monkeypatch):
    """HuggingFaceH4/MATH-500 is one test.jsonl; several files are one set, also for random access."""
    folder = hub(tmp_path, monkeypatch, "some/MATH")
    lines = [{"problem": f"é {i}", "solution": f"\\boxed{{{i}}}", "answer": f"{i}", "level": i} for i in range(5)]
    write(folder, "test-0.jsonl", "\n".join(map(json.dumps, lines[:2])) + "\n\n")
    write(folder, "test-1.jsonl", "\ufeff" + "\n".join(map(json.dumps, lines[2:])))
    for source in ("hub:some/MATH", "hub:some/MATH:test", "hub:some/MATH/default:test"):
        prompts = load(source, "all")
        for i in (4, 0, 2, 3, 1):
            assert {"problem": prompts[i]["prompt"], **prompts[i]["metadata"]} == lines[i]
    prompts = load("hub:some/MATH#solution", "all")
    assert prompts[3]["prompt"] == "\\boxed{3}" and prompts[3]["metadata"]["problem"] == "é 3"
    with pytest.raises(ValueError, match=r'test-0.jsonl:1: expected a key "text", got only'):
        load("hub:some/MATH#text")
    write(folder, "test-1.jsonl", '{"problem": "a", "answer": 1}\n\n{"problem": "b"}')
    with pytest.raises(ValueError, match=r'test-1.jsonl:3: expected "answer" or "solution" beside "problem"'):
        load("hub:some/MATH")


def test_hub_conversion_comes_before_json_lines(tmp_path, monkeypatch):
    folder = hub(tmp_path, monkeypatch, "some/set")
    write(folder, "train.jsonl", '{"text": "from the JSON lines"}')
    converted = folder.parent / ("1" * 40) / "default" / "train"
    converted.mkdir(parents=True)
    (folder.parents[1] / "refs" / "refs" / "convert").mkdir(parents=True)
    (folder.parents[1] / "refs" / "refs" / "convert" / "parquet").write_text("1" * 40)
    pq.write_table(pa.table({"text": ["converted"]}), converted / "0000.parquet")
    assert texts_of(load("hub:some/set#text", "all")) == ["converted"]
    with pytest.raises(ValueError, match="set:test: expected a config and a split with files, got none .*train.jsonl"):
        load("hub:some/set:test")


@pytest.mark.parametrize(
    "names, config, split, chosen, configs",
    [
        ("data/train-0 data/train-1 data/test-0", "", "", "data/train-0 data/train-1", "default"),
        ("data/train-0 data/test-0", "default", "test", "data/test-0", "default"),
        ("a b", "", "", "a b", "default"),
        ("a b", "", "test", "", ""),
        ("default/train/0000 default/test/0000", "", "", "default/train/0000", "default"),  # the hub's conversion
        ("default/partial-train/0000 default/test/0000", "", "train", "default/partial-train/0000", "default"),
        ("train_sft-0 train_gen-0", "", "train_sft", "train_sft-0", "default"),
        ("train_sft-0 test_sft-0", "", "train", "train_sft-0", "default"),
        ("train-0 train_extra-0", "", "", "train-0", "default"),
        ("gsm8k_train gsm8k_test", "", "test", "gsm8k_test", "default"),
        ("latest/0 contest/train", "", "test", "", ""),  # part of a word only
        ("math-test/train", "", "test", "", ""),  # the name of a config is not that of a split
        ("trainset testset", "", "", "trainset", "default"),
        ("a/test b/train", "", "test", "a/test", "a"),
        ("a/train b/train c/test", "", "", "a/train b/train", "a b"),
        ("wiki/en/train wiki/de/train", "wiki/de", "", "wiki/de/train", "wiki/de"),
        ("a/train b/train", "*", "", "a/train b/train", "*"),
    ],
)
def test_hub_files_of_config_and_split(names, config, split, chosen, configs):
    got = choose_files([f"{name}.parquet" for name in names.split()], config, split)
    assert got == ([f"{name}.parquet" for name in chosen.split()], configs.split())


# ------------------------------------------------------------------------------------------------------- math problems

GSM8K = [
    {
        "question": "A farm has 60 sheep,\nthen\t12 hundred more. How many?\n",
        "answer": "12*100=<<12*100=1200>>1200\n60+1200=<<60+1200=1260>>1260\n#### 1,260",
    },
    {"question": "What is 7 - 9?", "answer": "7-9=-2\n#### -2"},
]
MATH = [
    {
        "problem": "Solve\n\\[\n  \\frac{x}{2} = \\tfrac14, \\quad x > 0.\n\\]  Give $x$ \\& no more.",
        "level": "Level 1",
        "solution": "From \\boxed{x/2 = 1/4}\nwe get $x=\\boxed{\\frac{1}{2}}$.",
    },
    {"problem": "The name of the centre?", "level": "Level 5", "solution": "It is $\\boxed{\\text{Omega}}$."},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_math_files_agree_with_the_reward(tmp_path, suffix):
    score = pytest.importorskip("rewards").load("math", "cpu")
    right = [["so 60 + 1200 = 1260", "#### -2"], ["thus \\boxed{0.5}", "<answer>\\text{Omega}</answer>"]]
    wrong = [["60 of 1,260 are 1200", "\\boxed{2}"], ["x/2 = 1/4 = \\boxed{\\frac14}", "\\boxed{\\text{Alpha}}"]]
    for lines, good, bad in zip((GSM8K, MATH), right, wrong):
        prompts = load(rows_to_file(tmp_path, suffix, lines), "all")
        rows = [prompts[i] for i in range(len(prompts))]
        field = "question" if lines is GSM8K else "problem"
        assert [row["prompt"] for row in rows] == [line[field].strip() for line in lines]  # LaTeX, newlines: as it was
        for row, line in zip(rows, lines):
            kept = {key: value for key, value in line.items() if key != field}
            assert row["metadata"] == {"answer": line.get("solution"), **kept}
        metadata, texts = [row["metadata"] for row in rows], texts_of(prompts)
        assert score({"text": good}, texts, metadata).tolist() == [1, 1]
        assert score({"text": bad}, texts, metadata).tolist() == [0, 0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_math_fields_by_precedence(tmp_path, suffix):
    lines = [
        {"prompt": "p", "question": "q", "problem": "r", "answer": "1", "solution": "s"},
        {"prompt": "p2", "question": "q2", "problem": "r2", "answer": None, "solution": "s2"},
    ]
    prompts = load(rows_to_file(tmp_path, suffix, lines), "all")
    assert [prompts[i]["prompt"] for i in range(2)] == ["p", "p2"]
    assert prompts[0]["metadata"] == {"question": "q", "problem": "r", "answer": "1", "solution": "s"}
    assert prompts[1]["metadata"] == {"question": "q2", "problem": "r2", "answer": "s2", "solution": "s2"}
    chat = [{"prompt": [{"role": "user", "content": "c"}], "problem": "r", "answer": 7}]
    prompts = load(rows_to_file(tmp_path, suffix, chat), "all")
    assert prompts[0]["prompt"] == "r" and prompts[0]["metadata"]["answer"] == 7
    prompts = load(rows_to_file(tmp_path, suffix, [{"question": "q", "problem": "r", "answer": 0.5}]), "all")
    assert prompts[0] == {"prompt": "q", "metadata": {"problem": "r", "answer": 0.5}, "image": None}
    prompts = load(rows_to_file(tmp_path, suffix, [{"prompt": "p", "tag": "t"}]), "all")
    assert prompts[0]["metadata"] == {"tag": "t"}  # no answer, no error: not a problem file


def test_math_parquet_errors(tmp_path):
    path = rows_to_file(tmp_path, "parquet", [{"question": "q", "answer": "1"}, {"question": "q", "answer": None}])
    with pytest.raises(ValueError, match='parquet:2: expected "answer" or "solution" beside "question", got only'):
        load(path)
    path = rows_to_file(tmp_path, "parquet", [{"problem": "q", "level": 2, "answer": ["1"]}])
    with pytest.raises(ValueError, match='parquet:1: expected "answer" or "solution" beside "problem"'):
        load(path)
    path = rows_to_file(tmp_path, "parquet", [{"prompt": [{"role": "user", "content": "c"}], "solution": "1"}])
    with pytest.raises(ValueError, match="expected text in column 'prompt', got list.*chat messages are not supported"):
        load(path)


def test_math_test_split_stays_out_of_training(tmp_path, monkeypatch):
    folder = hub(tmp_path, monkeypatch, "some/math") / "main"
    folder.mkdir()
    for split, texts in {"train": ["a", "b\nb", "c"], "test": [" b\nb", "d"]}.items():
        pq.write_table(pa.table({"question": texts, "answer": ["1"] * len(texts)}), folder / f"{split}.parquet")
    test = "hub:some/math/main:test"
    assert texts_of(load("hub:some/math/main:train", "train", eval_source=test)) == ["a", "c"]
    assert texts_of(load("hub:some/math/main:train", "eval", eval_source=test)) == ["b\nb", "d"]


# --------------------------------------------------------------------------------------------------------------- split


def texts_of(prompts):
    return [prompts[i]["prompt"] for i in range(len(prompts))]


def test_held_out_split_is_disjoint_complete_and_stable(tmp_path):
    texts = [f"prompt {i % 1500}" for i in range(3000)]  # every text twice
    path = write(tmp_path, "a.txt", "\n".join(texts))
    train, held_out = texts_of(load(path)), texts_of(load(path, "eval"))
    assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(texts)
    assert abs(len(held_out) / 3000 - 0.1) < 4 * (0.1 * 0.9 / 1500) ** 0.5
    as_json = "\n".join(json.dumps({"prompt": text}) for text in reversed(texts))
    assert set(texts_of(load(write(tmp_path, "b.jsonl", as_json), "eval"))) == set(held_out)  # order, format: no matter
    for text in held_out:  # the rule itself, so that it cannot change by accident
        assert int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < 0.1 * 2**64
    assert set(held_out) < set(texts_of(load(path, "eval", held_out=0.2)))


def test_eval_source_is_left_out_of_training(tmp_path):
    path = write(tmp_path, "a.txt", "one\ntwo\nthree\nfour\n")
    other = write(tmp_path, "b.jsonl", '{"prompt": "two"}\n{"prompt": "four "}\n{"prompt": "five"}\n')
    assert texts_of(load(path, "train", eval_source=other)) == ["one", "three"]
    assert texts_of(load(path, "eval", eval_source=other)) == ["two", "four", "five"]


def test_shapes_brings_its_own_split_with_balanced_tags():
    shapes = pytest.importorskip("data.shapes")
    for split, items in (("train", shapes.train_prompts()), ("eval", shapes.held_out_prompts())):
        prompts = load("shapes", split)
        loaded = [prompts[i] for i in range(len(prompts))]
        metadata = {item["prompt"]: {k: v for k, v in item.items() if k != "prompt"} for item in items}
        assert {item["prompt"] for item in loaded} == set(metadata)
        assert all(item["metadata"] == metadata[item["prompt"]] for item in loaded)
        assert len(set(Counter(item["metadata"]["tag"] for item in loaded).values())) == 1
    assert len(load("shapes", "all")) == len(load("shapes")) + len(prompts)


def test_shapes_takes_tags():
    source = "shapes#counting,colors"
    for split in ("train", "eval"):
        some, every = load(source, split), load("shapes", split)
        tags = Counter(some[i]["metadata"]["tag"] for i in range(len(some)))
        assert set(tags) == {"counting", "colors"} and len(set(tags.values())) == 1
        assert {some[i]["prompt"] for i in range(len(some))} < {every[i]["prompt"] for i in range(len(every))}
    # as the file for evaluation it is its held-out part, which training then leaves out
    held_out = texts_of(load("shapes", "eval", eval_source=source))
    assert held_out == texts_of(load(source, "eval"))
    assert set(texts_of(load("shapes", "train", eval_source=source))).isdisjoint(held_out)
    with pytest.raises(ValueError, match="shapes#counting,colours: expected tags out of .*color_attr.* got 'colours'"):
        load("shapes#counting,colours")


def test_shapes_user_is_a_fixed_set_of_phrasings():
    phrases, shapes = pytest.importorskip("data.phrases"), pytest.importorskip("data.shapes")
    sides = dict(train=(8064, shapes.train_prompts()), eval=(864, shapes.held_out_prompts()))
    for stream, (split, (num_rows, captions)) in enumerate(sides.items()):
        prompts = load("shapes-user", split)
        rows = [prompts[i] for i in range(len(prompts))]
        assert len(rows) == num_rows
        assert Counter(row["metadata"]["tag"] for row in rows) == {tag: num_rows // 6 for tag in shapes.TAGS}
        by_caption, times = {item["prompt"]: item for item in captions}, Counter()
        for row in rows:
            caption = phrases.canonical(row["prompt"])
            assert {**row["metadata"], "prompt": caption} == by_caption[caption] and row["image"] is None
            times[caption] += 1
        for tag in shapes.TAGS:  # captions of a tag as often, within one
            counts = [times[item["prompt"]] for item in captions if item["tag"] == tag]
            assert max(counts) - min(counts) <= 1 and sum(counts) == num_rows // 6
        for i in (0, 7, num_rows - 1):  # a phrasing is a function of side and row number
            item = by_caption[phrases.canonical(rows[i]["prompt"])]
            assert rows[i]["prompt"] == phrases.user_prompt(item, np.random.default_rng([stream, i]))
        texts = [row["prompt"] for row in rows]
        # As often, within four standard errors, as the three templates and the four names of a word make it.
        as_it_is = [3] * num_rows
        for i, text in enumerate(texts):
            as_it_is[i] *= 4 ** len(re.findall("|".join(phrases.SYNONYMS), phrases.canonical(text)))
        for share, p in (
            (np.mean([text.startswith("draw ") for text in texts]), 1 / 3),
            (np.mean([text in by_caption for text in texts]), np.mean(1 / np.array(as_it_is))),
        ):
            assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / num_rows)
        assert len(set(texts)) > 0.5 * num_rows
    assert len(load("shapes-user", "all")) == 8928
    assert not set(texts_of(load("shapes-user"))) & set(texts)


def test_shapes_user_takes_tags_and_keeps_what_it_holds_out():
    some = load("shapes-user#counting,colors", "eval")
    every = load("shapes-user", "eval")
    wanted = [row for row in (every[i] for i in range(len(every))) if row["metadata"]["tag"] in ("counting", "colors")]
    assert [some[i] for i in range(len(some))] == wanted and len(wanted) == 288
    # what is held out stays so whatever evaluation draws; and no phrasing of a held-out caption is in the train set
    assert len(load("shapes-user", "train", eval_source="shapes-user#colors")) == 8064
    assert texts_of(load("arithmetic", "eval", eval_source="shapes-user")) == texts_of(every)
    with pytest.raises(ValueError, match="shapes-user#recolor: expected tags out of single_object.*got 'recolor'"):
        load("shapes-user#recolor")
    row = every[0]
    row["metadata"]["tag"] = "other"  # the caller's own
    assert every[0]["metadata"]["tag"] == "single_object"


def test_shapes_edit_is_a_fixed_set_with_pictures():
    shapes, SCORE = pytest.importorskip("data.shapes"), pytest.importorskip("rewards.shapes").load()
    train, held_out = load("shapes-edit"), load("shapes-edit", "eval")
    assert (len(train), len(held_out), len(load("shapes-edit", "all"))) == (4096, 512, 4608)
    assert not set(texts_of(train)) & set(texts_of(held_out))
    sources, targets, metadata = shapes.edits(0, 0, 512, shapes.held_out_edits())
    rows = [held_out[i] for i in range(512)]
    for row, source, m in zip(rows, sources, metadata):
        assert row["image"].mode == "RGB" and np.array_equal(np.asarray(row["image"]), source)
        assert {"prompt": row["prompt"], **row["metadata"]} == m
    assert SCORE.strict({"image": list(targets)}, None, [row["metadata"] for row in rows]).all()
    assert train[3]["prompt"] == load("shapes-edit", "all")[3]["prompt"]
    rows[0]["image"].paste((0, 0, 0), (0, 0, 32, 32))  # the caller's own
    assert np.array_equal(np.asarray(held_out[0]["image"]), sources[0])

    some = load("shapes-edit#recolor,add", "eval")
    assert {some[i]["metadata"]["tag"] for i in range(len(some))} == {"recolor", "add"} and len(some) > 150
    assert len(load("shapes-edit", "train", eval_source="shapes-edit#add")) == 4096
    with pytest.raises(ValueError, match="shapes-edit#counting: expected tags out of recolor, .*, got 'counting'"):
        load("shapes-edit#counting")


# -------------------------------------------------------------------------------------------------------------- images


def row_of(pixels, prompt="p"):
    return {"prompt": prompt, "metadata": {}, "image": Image.fromarray(np.asarray(pixels, np.uint8))}


def test_images_of_the_right_size_are_copied_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    out = images([row_of(p) for p in pixels], 5, 7)
    assert out.shape == (3, 3, 5, 7) and out.dtype.is_floating_point
    assert np.array_equal(out.numpy(), pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def test_images_are_cut_around_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 3), np.uint8)
    assert np.array_equal(images([row_of(pixels)], 4, 4)[0].numpy() * 255, pixels[:, 3:7].transpose(2, 0, 1))
    tall = pixels.transpose(1, 0, 2)
    assert np.array_equal(images([row_of(tall)], 4, 4)[0].numpy() * 255, tall[3:7].transpose(2, 0, 1))
    # Cut and resized: two halves of one colour each, the cut-away thirds of another.
    halves = np.zeros((40, 120, 3))
    halves[:, 40:60], halves[:, 60:80], halves[:, 80:] = 50, 200, 255
    out = images([row_of(halves)], 20, 20)[0] * 255
    assert (out[:, :, 3:7] == 50).all() and (out[:, :, 13:17] == 200).all()
    # Lanczos reaches over 3 pixels, also over the cut, where the picture goes on; none of it is cut away or shown.
    assert abs(out[:, :, :3] - 50).max() < 5 and abs(out[:, :, 17:] - 200).max() < 5


def test_images_are_antialiased():
    """A checkerboard of single pixels, scaled down by 4, is grey; without antialiasing it is black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255)[..., None].repeat(3, -1)
    assert abs(images([row_of(board)], 16, 16) - 0.5).max() < 0.05
    ramp = np.linspace(0, 255, 64)[None, :, None].repeat(64, 0).repeat(3, -1)
    for size in (16, 128):
        out = images([row_of(ramp)], size, size)[0, 0, 0].numpy()
        exact = np.interp((np.arange(size) + 0.5) * 64 / size - 0.5, np.arange(64), ramp[0, :, 0]) / 255
        assert abs(out - exact)[size // 8 : -size // 8].max() < 0.01  # Lanczos keeps a straight line, borders apart


def test_images_of_rows_of_any_size_and_mode_are_rgb():
    grey = {"prompt": "", "metadata": {}, "image": Image.new("L", (9, 30), 51)}
    out = images([grey, row_of(np.full((50, 20, 3), 102))], 8, 24)
    assert out.shape == (2, 3, 8, 24) and abs(out[0] - 0.2).max() < 1e-6 and abs(out[1] - 0.4).max() < 1e-6


def test_images_for_all_rows_or_none():
    nothing = {"prompt": "a dog", "metadata": {}, "image": None}
    assert images([nothing, nothing], 8, 8) is None and images([], 8, 8) is None
    with pytest.raises(ValueError, match=r"^prompt 'a dog' \(row 1 of 3\) has no image and others have one: expected"):
        images([row_of(np.zeros((8, 8, 3))), nothing, nothing], 8, 8)


# --------------------------------------------------------------------------------------------------------------- order


def test_order_is_a_stream_of_permutations():
    stream = order(101, 7, 0, 303)
    epochs = stream.reshape(3, 101)
    assert stream.dtype == np.int64
    assert (np.sort(epochs, axis=1) == np.arange(101)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3  # a new shuffle each time
    assert (epochs[2] == np.random.default_rng([7, 2]).permutation(101)).all()
    assert (order(101, 8, 0, 101) != epochs[0]).any()
    # written down: NumPy may change its streams, and a resumed run would then see other prompts
    assert order(8, 0, 0, 8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


@pytest.mark.parametrize("size, start, count, cut", [(10, 0, 35, 17), (10, 7, 3, 3), (1, 5, 4, 2), (1000, 999, 2, 1)])
def test_order_resumes(size, start, count, cut):
    whole = order(size, 3, start, count)
    halves = np.concatenate([order(size, 3, start, cut), order(size, 3, start + cut, count - cut)])
    assert len(whole) == count and (whole == halves).all()
    assert (whole == order(size, 3, 0, start + count)[start:]).all()


def test_order_ranks_are_disjoint_and_world_size_free():
    size, num_prompts, cursor = 64, 4, 8

    def rank_rows(world, rank, cursor):
        rows = order(size, 5, cursor, world * num_prompts)
        return rows[rank * num_prompts : (rank + 1) * num_prompts]

    eight = np.concatenate([rank_rows(8, rank, cursor) for rank in range(8)])
    assert len(set(eight.tolist())) == 32
    # the same 32 prompts on 2 ranks, 4 iterations
    two = np.concatenate([rank_rows(2, rank, cursor + 8 * i) for i in range(4) for rank in range(2)])
    assert (eight == two).all()


def test_order_rejects_nonsense_and_leaves_its_cache_alone():
    with pytest.raises(ValueError, match="size >= 1"):
        order(0, 0, 0, 1)
    with pytest.raises(ValueError, match="start >= 0"):
        order(3, 0, -1, 1)
    first = order(5, 0, 0, 5)
    kept = first.copy()
    first[:] = 0
    assert (order(5, 0, 0, 5) == kept).all() and len(order(5, 0, 3, 0)) == 0


# ----------------------------------------------------------------------------------------------------- committed files


def test_committed_files_are_what_the_grammar_makes():
    for name, text in make_prompts.texts().items():
        assert (DATA / name).read_text(encoding="utf-8") == text, f"{name}: run python -m data.make_prompts"
    for name, image in make_prompts.pictures().items():
        with Image.open(DATA / "edit_images" / f"{name}.png") as committed:
            off = np.abs(np.asarray(committed.convert("RGB"), int) - np.asarray(image.convert("RGB"), int)).max(-1)
        assert (off > 24).mean() < 0.005, name  # Pillow versions may differ at edges and in the palette


def test_committed_files_are_small_and_distinct():
    paths = [DATA / name for name in FILES] + sorted((DATA / "edit_images").iterdir())
    assert sum(path.stat().st_size for path in paths) < 2_000_000
    for name, count in zip(FILES, [4000, 2000, 3000, 400]):
        lines = (DATA / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)) == len(load(DATA / name, "all")) == count
        assert len(load(DATA / name, "eval")) > 0.04 * count


def test_scenes_are_sentences_of_8_to_30_words():
    for text in texts_of(load(DATA / "scenes.txt", "all")):
        assert 8 <= len(text.split()) <= 30 and text[0].isupper() and '"' not in text, text
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|  |\{|\}| ,|,,", text), text


def test_ocr_prompts_have_one_target():
    texts = texts_of(load(DATA / "ocr.txt", "all"))
    for text in texts:
        assert text.count('"') == 2 and not re.search(r"\ba [aeio]|\ban [^aeiouh]|  |\{|\}", text.split('"')[0]), text
        target = text.split('"')[1]
        assert 3 <= len(target) <= 29 and 1 <= len(target.split()) <= 5 and target == target.strip(), text
    assert len({text.split('"')[1] for text in texts}) > 700


def test_geneval_lines_mean_what_their_prompts_say():
    prompts = load(DATA / "geneval_train.jsonl", "all")
    tags, texts = Counter(), texts_of(prompts)
    assert len(set(make_prompts.CLASSES)) == 80 and len(set(texts)) == 3000
    # where GenEval renames, the index in COCO's order is what a detector knows
    assert [make_prompts.CLASSES.index(c) for c in ("computer mouse", "tv remote", "computer keyboard")] == [64, 65, 66]
    for i in range(len(prompts)):
        text, data = texts[i], prompts[i]["metadata"]
        tags[data["tag"]] += 1
        assert text.startswith("a photo of ") and not re.search(r"\ba [aeio]|\ban [^aeiou]", text), text
        for clause in data["include"]:
            assert clause["class"] in make_prompts.CLASSES and set(clause) <= {"class", "count", "color", "position"}
            assert clause.get("color", "red") in make_prompts.GENEVAL_COLOURS
        first, last = data["include"][0], data["include"][-1]
        said = [make_prompts.one_of(clause["class"], clause.get("color")) for clause in data["include"]]
        tag = data["tag"]
        assert ("exclude" in data) == (tag == "counting")
        if tag == "counting":
            assert data["exclude"] == [{"class": first["class"], "count": first["count"] + 1}]
            number = {"two": 2, "three": 3, "four": 4}[text.split()[3]]
            assert number == first["count"] and f" {make_prompts.plural(first['class'])}" in text
        elif tag == "position":
            relation, index = last["position"]
            assert index == 0 and "position" not in first and first["class"] != last["class"]
            assert text == f"a photo of {said[1]} {relation} {said[0]}"
        else:
            assert text == f"a photo of {' and '.join(said)}"
            assert all(("color" in clause) == (tag in ("colors", "color_attr")) for clause in data["include"])
            assert len(said) == {"single_object": 1, "colors": 1, "two_object": 2, "color_attr": 2}[tag]
    weights = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert tags.pop("single_object") == 40
    for tag, weight in weights.items():
        assert abs(tags[tag] - 2960 * weight / 17) < 1


def test_plurals_and_articles():
    words = {"knife": "knives", "bus": "buses", "sheep": "sheep", "toothbrush": "toothbrushes", "dog": "dogs"}
    words |= {"person": "people", "computer mouse": "computer mice", "couch": "couches", "tv": "tvs"}
    assert {word: make_prompts.plural(word) for word in words} == words
    assert make_prompts.one_of("apple") == "an apple" and make_prompts.one_of("apple", "red") == "a red apple"
    assert make_prompts.one_of("scissors", "blue") == "a pair of blue scissors"


def test_edits_fit_their_pictures():
    prompts = load(DATA / "edits.jsonl", "all")
    per_picture = Counter()
    lines = [json.loads(line) for line in (DATA / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, line in enumerate(lines):
        assert set(line) == {"image", "prompt", "caption", "target_caption", "reverse_prompt"}
        assert set(prompts[i]["metadata"]) == {"caption", "target_caption", "reverse_prompt"}
        per_picture[line["image"]] += 1
        assert line["caption"] != line["target_caption"] and line["prompt"] != line["reverse_prompt"]
        if match := re.fullmatch(r"change the colour of the (.*) from (\w+) to (\w+)", line["prompt"]):
            _, old, new = match.groups()
            assert old in line["caption"] and line["target_caption"].count(new) == line["caption"].count(new) + 1
        every = " ".join(line[key] for key in ("prompt", "caption", "target_caption", "reverse_prompt"))
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|  ", every), every
    assert len({(line["image"], line["prompt"]) for line in lines}) == 400
    assert per_picture == {f"edit_images/{name}.png": 25 for name in make_prompts.PICTURES} and len(per_picture) == 16
    for name in per_picture:
        path = DATA / name
        with Image.open(path) as image:
            assert image.size == (512, 512) and path.stat().st_size < 12_000
    assert prompts[0]["image"].mode == "RGB" and prompts[0]["image"].size == (512, 512)


def test_images_in_some_lines_only_are_an_error(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    lines = ['{"prompt": "one", "image": "a.png"}', '{"prompt": "two"}']
    for mixed, message in ((lines, r"jsonl:2: has no image"), (lines[::-1], r"jsonl:2: is the first with an image")):
        (tmp_path / "mixed.jsonl").write_text("\n".join(mixed))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "mixed.jsonl")


def test_arithmetic_has_its_own_split():
    sides = [load("arithmetic", side) for side in ("train", "eval", "all")]
    assert [len(side) for side in sides] == [7300, 500, 7800]
    texts = [{side[i]["prompt"] for i in range(len(side))} for side in sides]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == texts[2]
    for side in sides:
        for i in (0, 1, len(side) - 1):
            row = side[i]
            a, b = row["prompt"].removesuffix("=").split("+")
            assert row["metadata"]["answer"] == int(a) + int(b) and row["image"] is None
