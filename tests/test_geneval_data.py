import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch

from data import geneval
from data.prompts import load

OFFICIAL = [  # in the official file's format and words
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "two_object",
        "include": [{"class": "fork", "count": 1}, {"class": "cup", "count": 1}],
        "prompt": "a photo of a fork and a cup",
    },
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "colors",
        "include": [{"class": "car", "count": 1, "color": "red"}],
        "prompt": "a photo of a red car",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a cow",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "tv", "count": 1, "color": "blue"}, {"class": "cow", "count": 1, "color": "pink"}],
        "prompt": "a photo of a blue tv and a pink cow",
    },
]


def write(path, items):
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items))
    return str(path)


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def every():
    """Every prompt of the small tasks, and some of the others."""
    weights = {"single_object": 80, "counting": 936, "colors": 790, "two_object": 500, "position": 500}
    return geneval.generate(3306, weights={**weights, "color_attr": 500})


def test_generated_prompts_say_what_their_metadata_asks_for(every):
    numbers = {"two": 2, "three": 3, "four": 4}
    for item in every:
        geneval.check(item)
        words = item["prompt"].removeprefix("a photo of ").split()
        names = [clause["class"] for clause in item["include"]]
        assert item["prompt"].startswith("a photo of ") and len(set(names)) == len(names) == len(item["include"])
        assert ("exclude" in item) == (item["tag"] == "counting")
        if item["tag"] == "counting":
            assert numbers[words[0]] == item["include"][0]["count"]
            assert item["exclude"] == [{"class": names[0], "count": numbers[words[0]] + 1}]
        elif item["tag"] == "position":
            relation, target = item["include"][1]["position"]
            here, there = item["prompt"].split(f" {relation} ")
            assert target == 0 and here.endswith(names[1]) and there.endswith(names[0])
        else:
            parts = item["prompt"].removeprefix("a photo of ").split(" and ")
            looks = [f"{clause.get('color', '')} {clause['class']}".strip() for clause in item["include"]]
            assert len(parts) == len(looks) and all(part.endswith(look) for part, look in zip(parts, looks))
        coloured = sum("color" in clause for clause in item["include"])
        assert coloured == {"colors": 1, "color_attr": 2}.get(item["tag"], 0)
        assert not coloured or "person" not in names


def test_generated_prompts_cover_the_tasks_without_repeats(every):
    tags = Counter(item["tag"] for item in every)
    assert tags == {
        "single_object": 80, "counting": 936, "colors": 790, "two_object": 500, "position": 500, "color_attr": 500,
    }  # fmt: skip
    assert len({item["prompt"] for item in every}) == 3306
    used = Counter(clause["class"] for item in every for clause in item["include"])
    assert set(used) == set(geneval.CLASSES) and len(geneval.CLASSES) == 80
    assert {c["color"] for item in every for c in item["include"] if "color" in c} == set(geneval.COLORS)
    assert {c["position"][0] for item in every for c in item["include"] if "position" in c} == set(geneval.RELATIONS)


def test_generate_keeps_the_weights_and_repeats_small_tasks_evenly():
    items = geneval.generate(17_000, seed=1)
    tags = Counter(item["tag"] for item in items)
    assert tags == {"position": 7000, "counting": 5000, "color_attr": 3000, "colors": 1000, "two_object": 1000}
    times = {tag: Counter(item["prompt"] for item in items if item["tag"] == tag).values() for tag in tags}
    assert max(times["position"]) == max(times["color_attr"]) == max(times["two_object"]) == 1
    assert len(times["counting"]) == 936 and set(times["counting"]) == {5, 6}
    assert Counter(item["tag"] for item in items[:1700])["position"] == pytest.approx(700, abs=80)  # shuffled


@pytest.mark.parametrize("count", [0, 1, 2, 5, 23, 1001])
def test_generate_makes_exactly_as_many_as_asked_for(count):
    assert len(geneval.generate(count)) == count


def test_generate_depends_on_the_seed_alone():
    first = geneval.generate(50, seed=3)
    assert geneval.generate(50, seed=3) == first != geneval.generate(50, seed=4)
    # A changed file would quietly change every run made with it.
    assert first[0]["prompt"] == "a photo of four beds in a row"
    assert first[-1]["prompt"] == "a photo of a teddy bear above a cow"


def test_leave_out_goes_by_meaning():
    def prompts(left_out):
        weights = {tag: len(geneval._space(tag)) for tag in ("counting", "colors", "two_object", "position")}
        items = geneval.generate(sum(weights.values()), weights=weights, leave_out=left_out)
        return {item["prompt"].removeprefix("a photo of ") for item in items}

    gone = prompts(()) - prompts(OFFICIAL)
    assert gone == {
        "a fork and a cup", "a cup and a fork",
        "two clocks", "two clocks in a row", "two clocks on a plain background", "two clocks in bright daylight",
        "a red car", "a dog right of a cow", "a cow left of a dog",
    }  # fmt: skip


def test_meaning_tells_apart_what_looks_alike():
    def position(there, here, relation):
        include = [{"class": there, "count": 1}, {"class": here, "count": 1, "position": [relation, 0]}]
        return geneval.meaning({"include": include})

    assert position("cow", "dog", "above") == position("dog", "cow", "below")
    assert position("cow", "dog", "left of") == position("dog", "cow", "right of")
    different = [position(a, b, r) for a, b in (("cow", "dog"), ("dog", "cow")) for r in ("above", "left of")]
    different += [geneval.meaning(item) for item in OFFICIAL]
    swapped = [{"class": "tv", "count": 1, "color": "pink"}, {"class": "cow", "count": 1, "color": "blue"}]
    different += [geneval.meaning({"include": swapped})]
    different += [geneval.meaning({"include": [{"class": "dog", "count": 1}, {"class": "cow", "count": 1}]})]
    # of the official ones, only "a dog right of a cow" is "a cow left of a dog"
    assert len(set(different)) == len(different) - 1


def test_generate_names_what_is_wrong():
    with pytest.raises(ValueError, match="unknown task 'color'"):
        geneval.generate(10, weights={"color": 1})
    with pytest.raises(ValueError, match="weights above 0, got {'colors': -1}"):
        geneval.generate(10, weights={"colors": -1})
    with pytest.raises(ValueError, match="weights above 0"):
        geneval.generate(10, weights={"colors": math.nan})
    all_single = geneval.generate(80, weights={"single_object": 1})
    with pytest.raises(ValueError, match="no prompt of the task 'single_object' is left"):
        geneval.generate(10, weights={"single_object": 1}, leave_out=all_single)


# --------------------------------------------------------------------------------------------------------------- files


def test_read_and_the_prompt_loader_agree(tmp_path):
    path = write(tmp_path / "official.jsonl", OFFICIAL)
    assert geneval.read(path) == OFFICIAL
    prompts = load(path, "all")
    for i, item in enumerate(OFFICIAL):
        geneval.check(prompts[i]["metadata"])
        assert {**prompts[i]["metadata"], "prompt": prompts[i]["prompt"]} == item


def clause(**changes):
    return {"tag": "colors", "include": [{"class": "dog", "count": 1, **changes}], "prompt": "x"}


@pytest.mark.parametrize(
    "item, why",
    [
        ([1], "expected a dict with 'tag' and 'include', got"),
        ({"include": [{"class": "dog", "count": 1}], "prompt": "x"}, "expected a 'tag', like 'counting', got None"),
        ({"tag": "colors", "prompt": "x"}, "expected 'include' to be a list of objects to show, got None"),
        ({"tag": "colors", "include": [], "prompt": "x"}, "expected 'include' to be a list"),
        ({"tag": "colors", "include": ["dog"], "prompt": "x"}, "expected a clause with 'class' and 'count', got 'dog'"),
        ({**clause(), "exclude": {}}, "expected 'exclude' to be a list"),
        ({**clause(), "exclude": [{"class": "dog"}]}, "expected a positive 'count'"),
        ({**clause(), "prompt": None}, "expected a 'prompt', got None"),
        (clause(**{"class": "mouse"}), "expected a class of GenEval"),
        (clause(count=0), "expected a positive 'count'"),
        (clause(count=True), "expected a positive 'count'"),
        (clause(count="2"), "expected a positive 'count'"),
        (clause(color="grey"), "expected a color out of red, orange"),
        (clause(position=["left of", 0]), "expected a position .* of an earlier include clause"),  # itself
        (clause(position=["left of", -1]), "expected a position"),
        (clause(position=["next to", 0]), "expected a position"),
        (clause(position="left of"), "expected a position"),
    ],
)
def test_read_names_the_bad_line(tmp_path, item, why):
    path = write(tmp_path / "bad.jsonl", [OFFICIAL[4], item])
    with pytest.raises(ValueError, match=why) as error:
        geneval.read(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_read_names_a_line_that_is_not_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"tag": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: Expecting value"):
        geneval.read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"tag": "\xff"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:1: .*can't decode byte 0xff"):
        geneval.read(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one line, got an empty file"):
        geneval.read(tmp_path / "c.jsonl")


def run(*flags):
    return subprocess.run([sys.executable, "-m", "data.geneval", *flags], capture_output=True, text=True)


def test_command_line_writes_the_same_file_twice(tmp_path):
    official, out = write(tmp_path / "official.jsonl", OFFICIAL), tmp_path / "train.jsonl"
    flags = ["--out", str(out), "--count", "300", "--seed", "5", "--leave-out", official, "--weights", "counting:2"]
    done = run(*flags, "colors:1")
    assert done.returncode == 0 and done.stdout == f"{out}: 300 prompts, 300 of them distinct\n"
    first = out.read_bytes()
    items = geneval.read(out)
    assert items == geneval.generate(300, 5, {"counting": 2.0, "colors": 1.0}, OFFICIAL)
    assert Counter(item["tag"] for item in items) == {"counting": 200, "colors": 100}
    assert run(*flags, "colors:1").returncode == 0 and out.read_bytes() == first

    for wrong, why in [
        (["--weights", "colors:many"], "--weights colors:many: expected TASK:WEIGHT, like position:7"),
        (["--count", "0"], "--count 0: expected at least 1"),
        (["--leave-out", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ]:
        failed = run("--out", str(out), *wrong)
        assert failed.returncode == 2 and why in failed.stderr and "Traceback" not in failed.stderr
    assert out.read_bytes() == first


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_the_mean_of_the_task_means():
    # of four pictures per prompt, so many are correct; two_object has two prompts
    correct = {"single_object": [4], "two_object": [1, 2], "counting": [0], "colors": [3], "position": [2]}
    correct["color_attr"] = [1]
    strict, metadata = [], []
    for tag, prompts in correct.items():
        for number, hits in enumerate(prompts):
            item = {**OFFICIAL[0], "tag": tag, "prompt": f"{tag} {number}"}
            strict += [1.0] * hits + [0.0] * (4 - hits)
            metadata += [item] * 4
    table = geneval.scores(torch.tensor(strict), metadata)
    assert table == pytest.approx(
        {
            "single_object": 1.0,
            "two_object": 3 / 8,
            "counting": 0.0,
            "colors": 0.75,
            "position": 0.5,
            "color_attr": 0.25,
            "overall": (1 + 3 / 8 + 0.75 + 0.5 + 0.25) / 6,
            "pictures": 13 / 28,
            "prompts": 6 / 7,
        }  # fmt: skip
    )
    assert abs(table["overall"] - table["pictures"]) > 0.01  # they are not the same number
    order = torch.randperm(28, generator=torch.Generator().manual_seed(0)).tolist()
    assert geneval.scores([strict[i] for i in order], [metadata[i] for i in order]) == pytest.approx(table)


def test_scores_leave_out_what_was_not_judged():
    metadata = [item for item in OFFICIAL for _ in range(2)]
    strict = [1.0, math.nan] + [0.0, 1.0] * 5
    table = geneval.scores(strict, metadata)
    assert table["single_object"] == 1.0 and table["overall"] == pytest.approx((1 + 5 * 0.5) / 6)
    assert table["pictures"] == pytest.approx(6 / 11) and table["prompts"] == 1.0

    part = geneval.scores(strict[:4], metadata[:4])
    assert part["two_object"] == 0.5 and math.isnan(part["counting"]) and math.isnan(part["overall"])


def test_scores_want_one_result_per_item_of_a_known_task():
    with pytest.raises(ValueError, match="3 results for 6 metadata dicts"):
        geneval.scores([0.0] * 3, OFFICIAL)
    with pytest.raises(ValueError, match="unknown task 'colours'"):
        geneval.scores([0.0], [{**OFFICIAL[0], "tag": "colours"}])
