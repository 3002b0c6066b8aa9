"""The shapes world in the batches that pretrain.py trains on."""

import numpy as np
import pytest

import rewards
from data import phrases, prompts, shapes, shapes_qa, worlds
from data.worlds import World
from rewards import shapes as judge

MIXED = ["shapes", "shapes-edit"]


def plain(rows):
    """Rows as what can be compared: pictures as bytes."""
    return [
        {k: v if v is None or isinstance(v, str) else (v.size, v.tobytes()) for k, v in row.items()} for row in rows
    ]


def batches(count, *args, **options):
    world = World(*args, **options)
    return [plain(world.next()) for _ in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("size", [32, 48])
def test_rows_are_those_of_the_worlds(size):
    images, metadata = shapes.pictures(5, 7, 4, None, size)
    expected = [(m["prompt"], image.tobytes(), None, None) for image, m in zip(images, metadata)]
    sources, targets, edits = shapes.edits(5, 7, 4, None, size)
    edited = [(m["prompt"], t.tobytes(), s.tobytes(), None) for s, t, m in zip(sources, targets, edits)]
    seen, questions = shapes_qa.questions(5, 7, 4, size=size)
    asked = [(q["prompt"], image.tobytes(), None, q["metadata"]["answer"]) for image, q in zip(seen, questions)]
    for name, wanted in (("shapes", expected), ("shapes-edit", edited), ("shapes-qa", asked)):
        rows = worlds.read(name, 5, 7, 4, size)
        assert all(row["image"].size == (size, size) and row["image"].mode == "RGB" for row in rows)
        found = [(r["prompt"], r["image"].tobytes(), r["source"] and r["source"].tobytes(), r["answer"]) for r in rows]
        assert found == wanted, name
    # A user's words for a picture of shapes, and its caption.
    cot = worlds.read("shapes-cot", 5, 7, 4, size)
    assert [(row["answer"], row["image"].tobytes(), row["source"]) for row in cot] == [row[:3] for row in expected]


def test_answers_of_cot_are_the_captions_and_prompts_their_phrasings():
    for held_out, known in ((False, shapes.train_prompts()), (True, shapes.held_out_prompts())):
        rows = worlds.read("shapes-cot", 1, 0, 300, 32, held_out)
        captions = {m["prompt"] for m in known}
        assert all(phrases.canonical(row["prompt"]) == row["answer"] and row["answer"] in captions for row in rows)
        same = [row["prompt"] == row["answer"] for row in rows]
        assert 0 < sum(same) < 60  # most are put another way
        # One caption is not always asked for in the same words.
        words = {}
        for row in rows:
            words.setdefault(row["answer"], set()).add(row["prompt"])
        assert any(len(ways) > 1 for ways in words.values())
    assert plain(worlds.read("shapes-cot", 1, 100, 3, 32)) == plain(worlds.read("shapes-cot", 1, 0, 103, 32))[100:]


def test_pictures_show_what_the_texts_say():
    score = rewards.load("shapes")
    rows = worlds.read("shapes", 3, 0, 20, 32) + worlds.read("shapes-cot", 3, 20, 20, 32)
    metadata = shapes.pictures(3, 0, 40)[1]
    pictures = [np.asarray(row["image"]) for row in rows]
    assert score.strict({"image": pictures}, [m["prompt"] for m in metadata], metadata).tolist() == [1.0] * 40


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("names, share", [(["shapes"], 0.0), (["shapes-qa"], 0.5), (["shapes-cot"], 0), (MIXED, 0.3)])
def test_a_batch_is_a_function_of_seed_and_number(names, share):
    found = batches(6, names, share, 7, 3, 32)
    assert found == batches(6, names, share, 7, 3, 32)
    assert all(len(batch) == 3 for batch in found) and len({str(batch) for batch in found}) == 6
    assert not any(batch in found for batch in batches(6, names, share, 8, 3, 32))
    late = World(names, share, 7, 3, 32)
    late.load_state({"number": 4})
    assert plain(late.next()) == found[4]
    # Nothing comes twice: batch n has samples 3 n ... 3 n + 2 of the world.
    kinds = [names[-1] if batch[0]["source"] else names[0] for batch in found]
    assert found == [plain(worlds.read(kind, 7, 3 * n, 3, 32)) for n, kind in enumerate(kinds)]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_see_in_one_batch_each_what_one_rank_sees_in_many(size):
    one = batches(6 * size, MIXED, 0.4, 1, 2, 32)
    ranks = [batches(6, MIXED, 0.4, 1, 2, 32, rank, size) for rank in range(size)]
    assert [batch for together in zip(*ranks) for batch in together] == one


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_share_of_edits_is_exact_and_even(share):
    world = World(MIXED, share, 1, 1, 32)
    edits = np.array([world.next()[0]["source"] is not None for _ in range(60)])
    assert edits.sum() == round(60 * share)
    # However many batches have come, it is off by less than one.
    assert (np.abs(edits.cumsum() - share * np.arange(1, 61)) < 1 + 1e-9).all()


def test_a_batch_is_of_one_kind():
    for batch in batches(10, MIXED, 0.5, 1, 4, 32):
        assert len({row["source"] is None for row in batch}) == 1


def test_held_out_prompts_and_scenes_are_in_no_training_batch():
    counts = {"shapes": 800, "shapes-edit": 500, "shapes-qa": 100, "shapes-cot": 400}
    held_out = {name: worlds.read(name, 0, 0, 100, 32, held_out=True) for name in worlds.WORLDS}
    train = {name: worlds.read(name, 1, 0, counts[name], 32) for name in worlds.WORLDS}
    for name, key in (("shapes", "prompt"), ("shapes-edit", "prompt"), ("shapes-cot", "answer")):
        texts = {row[key] for row in train[name]}
        if name != "shapes-edit":  # an instruction fits many scenes
            assert not texts & {row[key] for row in held_out[name]} and len(texts) > 150
    trained = {m["prompt"] for m in shapes.train_prompts()}
    assert {row["prompt"] for row in train["shapes"]} <= trained
    assert {row["answer"] for row in train["shapes-cot"]} <= trained
    assert not {row["answer"] for row in held_out["shapes-cot"]} & trained

    def scene(picture):
        return tuple(sorted((found["class"], found["color"]) for found in judge.analyse(np.asarray(picture))))

    edits = {(scene(row["source"]), row["prompt"]) for row in train["shapes-edit"]}
    held = {(scene(row["source"]), row["prompt"]) for row in held_out["shapes-edit"]}
    assert len(held) > 50 and not edits & held
    sides = {shapes_qa.side_of(scene(row["image"])) for row in train["shapes-qa"][:200]}
    assert sides == {"train"} and {shapes_qa.side_of(scene(r["image"])) for r in held_out["shapes-qa"]} == {"held_out"}
    # What is drawn in evaluations is what the validation loss is of: none of it is trained on.
    drawn = prompts.load("shapes", "eval")
    shown = {drawn[i]["prompt"] for i in range(len(drawn))}
    assert not shown & trained


def test_state_goes_on_exactly_and_counts():
    world = World(MIXED, 0.5, 3, 2, 32, 1, 2)
    found = [plain(world.next()) for _ in range(3)]
    state = world.state()
    assert state == {"number": 3} and world.counts() == dict(seen=6, bad_image=0, bad_prompt=0, bad_file=0)
    rest = [plain(world.next()) for _ in range(3)]
    other = World(MIXED, 0.5, 3, 2, 32, 1, 2)
    assert [plain(other.next()) for _ in range(3)] == found
    other.load_state(state)
    assert other.counts()["seen"] == 6 and [plain(other.next()) for _ in range(3)] == rest
    other.load_state({"number": 0})
    assert plain(other.next()) == found[0]


def test_an_unknown_world_is_named():
    with pytest.raises(ValueError, match="^shape: no shapes world; expected one of shapes, shapes-edit, shapes-qa, sh"):
        World(["shapes", "shape"], 0.5, 1, 2, 32)
