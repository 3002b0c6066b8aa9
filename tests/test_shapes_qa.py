"""Questions about shapes: answers read off the pixels, the split, the reward, tiny-qwen-vl's tokenizer and training,
and the weights that are shipped in assets/tiny-qwen-vl."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from data import prompts, shapes, shapes_qa
from models import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "assets", "tiny-qwen-vl")
SMALL = dict(width=64, num_layers=1, num_heads=2, num_kv_heads=1, ff_dim=64)
SMALL |= dict(vision_width=32, vision_layers=2, vision_heads=2, vision_ff_dim=32)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.qwen_vl_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return tiny.qwen_vl_processor()


@pytest.fixture(scope="module")
def shipped():
    """Stock classes only."""
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED).eval()
    return model, AutoTokenizer.from_pretrained(SHIPPED), Qwen2VLImageProcessorPil.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def results():
    with open(os.path.join(ROOT, "runs", "results", "tiny_qwen_vl.json")) as file:
        return json.load(file)


# ----------------------------------------------------------------------------------------------------------------------
# Questions and answers


def look(picture):
    """[(class, colour, x, y)] of the objects in a picture, by its pixels alone: an object is what hangs together, its
    colour that of its darkest pixel, its class the share of its box that it covers (1, pi/4, 1/2)."""
    ink = 1 - picture.min(-1) / 255  # the share of a pixel that is covered
    left, found = set(map(tuple, np.argwhere(ink > 0))), []
    while left:
        stack = [left.pop()]
        pixels = stack[:]
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
            pixels += near
        ys, xs = np.array(pixels).T
        height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
        share = ink[ys, xs].sum() / (height * width)
        name = "square" if share > 0.9 else "circle" if share > 0.65 else "triangle"
        rgb = picture[ys, xs][ink[ys, xs].argmax()].astype(int)
        color = min(shapes.COLORS, key=lambda c: np.abs(rgb - shapes.COLORS[c]).sum())
        found.append((name, color, xs.min() + width / 2, ys.min() + height / 2))
    return found


def solve(question, objects):
    """The answer by what `look` saw; the question must have exactly one."""
    if match := re.fullmatch(r"how many (\w+) shapes\?", question):
        return str(sum(color == match[1] for _, color, _, _ in objects))
    if match := re.fullmatch(r"how many (\w+)s\?", question):
        return str(sum(name == match[1] for name, _, _, _ in objects))
    if match := re.fullmatch(r"what color is the (circle|square|triangle)\?", question):
        (answer,) = [color for name, color, _, _ in objects if name == match[1]]
        return answer
    if match := re.fullmatch(r"what shape is (\w+)\?", question):
        (answer,) = [name for name, color, _, _ in objects if color == match[1]]
        return answer
    match = re.fullmatch(r"what color is the (leftmost|rightmost|highest|lowest) shape\?", question)
    axis, sign = {"leftmost": (2, 1), "rightmost": (2, -1), "highest": (3, 1), "lowest": (3, -1)}[match[1]]
    first, second = sorted(objects, key=lambda thing: sign * thing[axis])[:2]
    assert sign * (second[axis] - first[axis]) >= 4 and first[1] != second[1]
    return first[1]


@pytest.mark.parametrize("side", ["train", "validation", "held_out"])
def test_answers_are_what_the_pixels_show(side):
    pictures, rows = shapes_qa.questions(5, 0, 250, side)
    assert pictures.shape == (250, 32, 32, 3) and pictures.dtype == np.uint8
    for picture, row in zip(pictures, rows):
        objects = look(picture)
        assert 1 <= len(objects) <= 4 and set(row) == {"prompt", "metadata"}
        assert row["metadata"] == {"answer": solve(row["prompt"], objects), "tag": row["metadata"]["tag"]}
        assert shapes_qa.side_of([(name, color) for name, color, _, _ in objects]) == side
    kinds = {"how many": "counting", "what shape": "shape"}
    for row in rows:
        words = row["prompt"].split()
        tag = kinds.get(" ".join(words[:2]), "color" if words[-1][:-1] in shapes.CLASSES else "position")
        assert row["metadata"]["tag"] == tag


def test_scenes_tell_what_the_pictures_of_questions_show():
    pictures, drawn = shapes_qa.scenes(5, 0, 40)
    assert np.array_equal(pictures, shapes_qa.questions(5, 0, 40)[0])
    for picture, (things, boxes) in zip(pictures, drawn):
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        shown = [(*thing, *centre) for thing, centre in zip(things, centres.tolist())]
        assert sorted(shown) == sorted(look(picture))


def test_split_is_of_all_scenes_and_ignores_the_order_of_things():
    things = list(itertools.product(shapes.CLASSES, shapes.COLORS))
    scenes = [s for n in (1, 2, 3, 4) for s in itertools.combinations_with_replacement(things, n)]
    count = Counter(map(shapes_qa.side_of, scenes))
    # 7,314 scenes; 13, 1 and 2 of 16. A standard error is 33, 21 and 28 scenes.
    assert len(scenes) == 7314 and set(count) == {"train", "validation", "held_out"}
    assert abs(count["train"] - 5943) < 120 and abs(count["held_out"] - 914) < 100
    assert all(shapes_qa.side_of(list(scene[::-1])) == shapes_qa.side_of(scene) for scene in scenes[::7])


def test_questions_are_the_same_in_another_process():
    # Splitting by Python's own hash() would differ from process to process.
    code = "from data import shapes_qa as q; p, r = q.questions(3, 7, 20, 'held_out'); print(p.astype(int).sum(), r)"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    pictures, rows = shapes_qa.questions(3, 7, 20, "held_out")
    assert output.stdout.decode().strip() == f"{pictures.astype(int).sum()} {rows}"


def test_question_is_a_function_of_seed_and_index():
    pictures, rows = shapes_qa.questions(3, 0, 60)
    part = shapes_qa.questions(3, 20, 15)
    assert np.array_equal(part[0], pictures[20:35]) and part[1] == rows[20:35]
    assert shapes_qa.questions(4, 0, 60)[1] != rows
    nothing = shapes_qa.questions(3, 0, 0)
    assert nothing[0].shape == (0, 32, 32, 3) and nothing[1] == []
    large, same = shapes_qa.questions(3, 0, 4, size=64)
    assert large.shape == (4, 64, 64, 3) and same == rows[:4]
    assert {row["metadata"]["tag"] for row in shapes_qa.questions(3, 0, 40, tags=("shape",))[1]} == {"shape"}


@pytest.fixture(scope="module")
def sides():
    return prompts.load("shapes-qa"), prompts.load("shapes-qa", split="eval")


def test_constant_answers_score_as_low_as_said(sides):
    rows = [sides[0][i] for i in range(len(sides[0]))]
    tags = Counter(row["metadata"]["tag"] for row in rows)
    assert all(abs(tags[tag] - 1024) < 120 for tag in shapes_qa.TAGS)  # 4.3 standard errors
    answers = Counter((row["metadata"]["tag"], row["metadata"]["answer"]) for row in rows)
    for tag, best in (("counting", 1 / 4), ("color", 1 / 6), ("shape", 1 / 3), ("position", 1 / 6)):
        shares = [answers[tag, answer] / tags[tag] for answer in shapes_qa.answers(tag)]
        assert sum(shares) == pytest.approx(1) and all(abs(share - best) < 0.06 for share in shares)  # 4 of them
    # The best answer to every one of the 22 questions, in hindsight: what can be had without looking.
    questions = Counter((row["prompt"], row["metadata"]["answer"]) for row in rows)
    blind = sum(max(n for (q, _), n in questions.items() if q == question) for question in shapes_qa.all_questions())
    assert len({q for q, _ in questions}) == 22 and 0.22 < blind / len(rows) < 0.28
    assert set(shapes_qa.all_answers()) == {row["metadata"]["answer"] for row in rows}
    assert max(Counter(row["metadata"]["answer"] for row in rows).values()) / len(rows) < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# As a source of prompts


def test_prompts_hold_out_scenes_and_keep_their_pictures(sides):
    train, held_out = sides
    assert (len(train), len(held_out), len(prompts.load("shapes-qa", split="all"))) == (4096, 512, 4608)
    pictures, rows = shapes_qa.questions(0, 0, 512, "held_out")
    for i in (0, 5, 511):
        assert np.array_equal(held_out[i]["image"], pictures[i])
        assert {key: held_out[i][key] for key in ("prompt", "metadata")} == rows[i]
    seen = {train[i]["image"].tobytes() for i in range(len(train))}
    assert not seen & {held_out[i]["image"].tobytes() for i in range(512)} and len(seen) > 4000
    for i in range(0, 512, 16):
        assert shapes_qa.side_of([thing[:2] for thing in look(np.asarray(held_out[i]["image"]))]) == "held_out"
    train[0]["metadata"]["answer"] = "changed"
    assert train[0]["metadata"]["answer"] in shapes_qa.all_answers()


def test_prompts_of_some_tags_and_of_none_that_is_known():
    some = prompts.load("shapes-qa#counting,shape", split="eval")
    assert {some[i]["metadata"]["tag"] for i in range(len(some))} == {"counting", "shape"} and 200 < len(some) < 312
    with pytest.raises(ValueError, match="shapes-qa#colors: expected tags out of counting, color, .*, got 'colors'"):
        prompts.load("shapes-qa#colors")


def test_evaluating_on_some_held_out_questions_takes_nothing_from_training():
    # The texts of the questions are the same on both sides; were they compared, no counting would be left.
    train = prompts.load("shapes-qa", eval_source="shapes-qa#counting")
    held_out = prompts.load("shapes-qa", split="eval", eval_source="shapes-qa#counting")
    assert len(train) == 4096
    assert {held_out[i]["metadata"]["tag"] for i in range(len(held_out))} == {"counting"}


# ----------------------------------------------------------------------------------------------------------------------
# Reward


@pytest.mark.parametrize(
    "reply, answer, expected",
    [
        ("3", "3", 1),
        ("red", "red", 1),
        (" Red.\n", "red", 1),
        ("RED .", "red", 1),
        ("red<|im_end|>", "red", 1),
        ("<answer>red</answer>", "red", 1),
        ("I see a circle. <answer> Red. </answer> Bye", "red", 1),
        ("<think>blue? no</think>red", "red", 1),
        ("<think>blue</think>\n<answer>red</answer><|im_end|>", "red", 1),
        ("<answer>blue</answer> no: <answer>red</answer>", "red", 1),  # one guess: the last
        ("red", "Red.", 1),
        ("blue", "red", 0),
        ("red blue green", "red", 0),
        ("red, blue", "red", 0),
        ("red red", "red", 0),
        ("red\nblue", "red", 0),
        ("it is red", "red", 0),
        ("<answer>red blue</answer>", "red", 0),
        ("<answer>red</answer><answer>blue</answer>", "red", 0),
        ("red <answer>blue</answer>", "red", 0),
        ("<answer></answer>", "red", 0),
        ("<think>red", "red", 0),
        ("re", "red", 0),
        ("reddish", "red", 0),
        ("red..", "red", 0),
        (".red", "red", 0),
        ("", "red", 0),
        (".", "red", 0),
        ("13", "3", 0),
        ("3.0", "3", 0),
        ("three", "3", 0),
        ("1 2 3 4", "3", 0),
        ("\u0663", "3", 0),  # another alphabet's three
    ],
)
def test_reward_is_one_for_the_word_and_nothing_else(reply, answer, expected):
    score = rewards.load("shapes_qa")
    got = score({"text": [reply]}, ["what?"], [{"answer": answer}])
    assert got.dtype == torch.float32 and got.tolist() == [expected]


def test_reward_judges_every_item_by_its_own_metadata():
    score = rewards.load("shapes_qa")
    rows = shapes_qa.questions(0, 0, 60)[1]
    metadata = [row["metadata"] for row in rows]
    right = [item["answer"] for item in metadata]
    assert score({"text": right}, [""] * 60, metadata).tolist() == [1.0] * 60
    shifted = right[1:] + right[:1]
    expected = [float(a == b) for a, b in zip(right, shifted)]
    assert score({"text": shifted}, [""] * 60, metadata).tolist() == expected and 0 < sum(expected) < 60
    assert score({"text": [" ".join(shapes_qa.all_answers())] * 60}, [""] * 60, metadata).sum() == 0
    assert score.strict is score and score.needs == ("text",) and score.name == "shapes_qa"
    assert score({"text": []}, [], []).shape == (0,)


def test_reward_of_what_is_no_text_is_nan_and_metadata_without_an_answer_an_error():
    score = rewards.load("shapes_qa")
    got = score({"text": ["red", None, 3]}, [""] * 3, [{"answer": "red"}] * 3)
    assert got[0] == 1 and got[1:].isnan().all()
    for bad in ({}, {"answer": ""}, {"answer": " . "}, {"answer": 3}, {"answer": None}, None):
        with pytest.raises(ValueError, match=r"shapes_qa, item 1: metadata 'answer': expected a word, got "):
            score({"text": ["red", "red"]}, [""] * 2, [{"answer": "red"}, bad])


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and image processor


def test_tokenizer_has_a_token_for_every_word_and_reads_anything_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    for t in (tokenizer, loaded):
        assert [len(t(word).input_ids) for word in shapes_qa.all_answers()] == [1] * 13
        for question in shapes_qa.all_questions():
            assert len(t(question).input_ids) == len(question.split()) + 1  # and the question mark
        for text in (*shapes_qa.all_questions(), "", "Zürich 東京\n\t x  y", "<answer>red</answer>", "</think>"):
            assert t.decode(t(text).input_ids) == text
        assert (t.eos_token, t.pad_token, t.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
        assert t("red<|im_end|>").input_ids == [*t("red").input_ids, t.eos_token_id]  # nothing is added unasked
        special = ["<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
        ids = t("".join(special) + "red<|im_end|><|endoftext|>").input_ids
        assert ids[:4] == t.convert_tokens_to_ids(special) and len(set(ids)) == len(ids) == 7
        assert t.decode(ids, skip_special_tokens=True) == "red"


def test_chat_template_takes_text_and_lists(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "how many circles?"}]
    user, reply = {"role": "user", "content": content}, {"role": "assistant", "content": "3"}
    start = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>how many circles?<|im_end|>\n"
    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert t.apply_chat_template([user, reply], tokenize=False) == start + "<|im_start|>assistant\n3<|im_end|>\n"
        text = t.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        assert text == start + "<|im_start|>assistant\n"
        plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        assert t.apply_chat_template(plain, tokenize=False) == expected
        two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
        assert t.apply_chat_template(two, tokenize=False).count("<|vision_start|><|image_pad|><|vision_end|>") == 2


def test_processor_cuts_a_picture_into_patches_without_resizing_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for p in (processor, Qwen2VLImageProcessorPil.from_pretrained(tmp_path)):
        out = p(images=[picture, Image.fromarray(picture)], return_tensors="pt")
        assert out["pixel_values"].shape == (128, 96) and out["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
        assert torch.equal(out["pixel_values"][:64], out["pixel_values"][64:])
        # token row, token column, row and column of the patch in its token; channel, time, y, x
        patches = out["pixel_values"][:64].reshape(4, 4, 2, 2, 3, 2, 4, 4)
        whole = patches.permute(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, 32, 32, 3)
        expected = torch.from_numpy(picture).float() / 127.5 - 1
        for frame in whole:
            torch.testing.assert_close(frame, expected, atol=1e-6, rtol=0)
        for size, grid in (((16, 16), (8, 8)), ((40, 56), (10, 14)), ((64, 64), (16, 16)), ((512, 256), (22, 10))):
            got = p(images=[np.zeros((*size, 3), np.uint8)], return_tensors="pt")["image_grid_thw"][0].tolist()
            assert got == [1, *grid] and 64 <= got[1] * got[2] <= 256


# ----------------------------------------------------------------------------------------------------------------------
# Model and training


def test_model_has_the_dimensions_said_and_depends_on_the_seed_only(tokenizer):
    state = torch.get_rng_state()
    a, b, c = tiny.qwen_vl(0), tiny.qwen_vl(0), tiny.qwen_vl(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(a).__name__ == "Qwen2_5_VLForConditionalGeneration"
    # Per layer: q with bias, k and v of half the width with bias, o, three feed-forward matrices, two norms.
    layer = (128 * 128 + 128) + 2 * (128 * 64 + 64) + 128 * 128 + 3 * 128 * 384 + 2 * 128
    assert sum(p.numel() for p in a.model.language_model.parameters()) == 3 * layer + len(tokenizer) * 128 + 128
    # Per block: q, k, v and output with bias, three feed-forward matrices with bias, two norms; patches without bias;
    # and the merger of four patches: a norm, two matrices with bias.
    block = 4 * (96 * 96 + 96) + 3 * 96 * 192 + 2 * 192 + 96 + 2 * 96
    merger = 96 + 384 * 384 + 384 + 384 * 128 + 128
    assert sum(p.numel() for p in a.model.visual.parameters()) == 2 * block + 96 * 96 + merger
    assert sum(p.numel() for p in a.parameters()) == 1_031_584
    assert a.lm_head.weight is a.model.language_model.embed_tokens.weight
    assert a.generation_config.eos_token_id == tokenizer.eos_token_id
    assert a.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_inputs_are_the_chat_with_16_tokens_a_picture_and_labels_on_the_answer(tokenizer, processor):
    pictures, rows = shapes_qa.questions(0, 0, 20)
    inputs, labels = tiny.vlm_inputs(tokenizer, processor, pictures, rows)
    assert set(inputs) == {"input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    for i, row in enumerate(rows):
        text = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
        text += f"{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['metadata']['answer']}<|im_end|>"
        ids = tokenizer(text).input_ids
        assert inputs["input_ids"][i, : len(ids)].tolist() == ids
        assert (inputs["input_ids"][i, len(ids) :] == tokenizer.pad_token_id).all()
        kept = labels[i] >= 0
        assert kept.sum() == 2 and kept[len(ids) - 2 : len(ids)].all() and labels[i][kept].tolist() == ids[-2:]
        assert inputs["mm_token_type_ids"][i].tolist() == [0] * 4 + [1] * 16 + [0] * (labels.shape[1] - 20)
    assert labels.shape[1] > len(ids) or len({len(row["prompt"].split()) for row in rows}) > 1  # some were padded


def test_model_tells_rows_and_columns_of_a_picture_apart(tokenizer, processor):
    model = tiny.qwen_vl(0, **SMALL)
    inputs, _ = tiny.vlm_inputs(tokenizer, processor, *shapes_qa.questions(0, 0, 1))
    position, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    time, row, column = position[:, 0, 4:20]
    assert (time == 4).all() and (row - 4).tolist() == [i // 4 for i in range(16)]
    assert (column - 4).tolist() == [i % 4 for i in range(16)] and position[0, 0, 20] == 8
    rotary = model.model.language_model.rotary_emb
    cos, sin = rotary(torch.zeros(1), position)
    angles = torch.cat([cos, sin], -1)[0, 4:20]
    # Columns have the last six of 16 frequencies, and each of them twice: two points on the unit circle that lie at an
    # angle a have the distance 2 sin(a / 2).
    distance = torch.cdist(angles, angles)
    angle = torch.tensor([10 ** (-i / 16) for i in range(10, 16)])
    expected = (2 * (2 * (angle / 2).sin()).square().sum()).sqrt()
    torch.testing.assert_close(distance[0, 1], expected, atol=1e-4, rtol=0)
    assert distance[~torch.eye(16, dtype=bool)].min() > 0.5  # no two tokens look alike


def test_training_lowers_the_loss_and_repeats_bit_for_bit(tokenizer, processor):
    runs, few = [], dict(num_iterations=40, batch_size=8, learning_rate=1e-2, warmup=5, eval_every=20, eval_size=50)
    for seed in (0, 0, 1):
        model = tiny.qwen_vl(0, **SMALL)
        out = tiny.train_vlm(model, tokenizer, processor, seed, **few)
        runs.append((out, [p.detach().clone() for p in model.parameters()]))
        assert not model.training
    losses = runs[0][0]["losses"]
    assert len(losses) == runs[0][0]["iterations"] == 40
    # Before training every one of 369 tokens is about as likely as any other. One of 13 words and the end token, which
    # costs nothing once it is learnt, is (ln 13) / 2 = 1.28.
    assert abs(losses[0] - np.log(369)) < 0.3 and sum(losses[-5:]) / 5 < 2.0
    assert runs[0][0] == runs[1][0] and all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1]))
    assert runs[2][0]["losses"] != losses
    start = tiny.qwen_vl(0, **SMALL).parameters()
    assert not any(torch.equal(p, q) for p, q in zip(start, runs[0][1]))  # all of it is trained


def test_confused_answers_are_wrong_words_of_the_same_kind():
    for right, wrong in tiny.CONFUSED.items():
        kinds = [tag for tag in shapes_qa.TAGS if right in shapes_qa.answers(tag)]
        assert kinds and all(wrong in shapes_qa.answers(tag) for tag in kinds)
        assert wrong not in tiny.CONFUSED  # half of the words are always right, and the others are said for them
    _, rows = shapes_qa.questions(0, 0, 200)
    for row in rows:
        answer, confused = row["metadata"]["answer"], tiny.confuse(row, True)
        assert confused["metadata"] == row["metadata"] | {"answer": tiny.CONFUSED.get(answer, answer)}
        assert tiny.confuse(row, False) == row and confused["prompt"] == row["prompt"]


def test_training_stops_at_the_accuracy_asked_for_and_leaves_a_frozen_tower(tokenizer, processor):
    model, start = tiny.qwen_vl(0, **SMALL), tiny.qwen_vl(0, **SMALL)
    model.model.visual.requires_grad_(False)
    arguments = dict(num_iterations=9, batch_size=4, stop_accuracy=0.0, eval_every=2, eval_size=20)
    assert tiny.train_vlm(model, tokenizer, processor, **arguments)["iterations"] == 2
    pairs = list(zip(model.model.visual.parameters(), start.model.visual.parameters()))
    assert all(torch.equal(p, q) for p, q in pairs) and not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_tower_learns_where_objects_are_and_repeats_bit_for_bit(processor):
    out = []
    for seed, num_iterations in ((0, 4), (0, 4), (1, 4), (0, 60)):
        visual = tiny.qwen_vl(0, **SMALL).model.visual
        out.append(
            (tiny.train_tower(visual, processor, seed, num_iterations, 16, 1e-2, eval_size=100), visual.state_dict())
        )
    equal = [all(torch.equal(p, other[1][name]) for name, p in out[0][1].items()) for other in out[1:3]]
    assert equal == [True, False] and out[0][0] == out[1][0]
    # After a few steps it says "nothing" everywhere, or names one of 18 objects; then it sees colours at least.
    assert out[0][0]["tower_accuracy"] < 0.15 < out[3][0]["tower_accuracy"] and out[3][0]["tower_iterations"] == 60


class Oracle(torch.nn.Module):
    """Answers every question with probability .6, .4 or 0 of the right word, and an end token that is half as likely as
    <|endoftext|> where the answer is a number."""

    def __init__(self, tokenizer, rows):
        super().__init__()
        self.tokenizer, self.rows = tokenizer, rows

    def forward(self, input_ids, **_):
        p = torch.full((*input_ids.shape, len(self.tokenizer)), 1e-12)
        for i, row in enumerate(self.rows):
            end = (input_ids[i] == self.tokenizer.eos_token_id).nonzero()[1].item()
            word = self.tokenizer(row["metadata"]["answer"]).input_ids[0]
            share = (0.6, 0.4, 0.0)[i % 3]
            p[i, end - 2, [word, self.tokenizer.pad_token_id]] = torch.tensor([share, 1 - share])
            share = 1 / 3 if row["metadata"]["tag"] == "counting" else 1.0
            p[i, end - 1, [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]] = torch.tensor([share, 1 - share])
        return type("Output", (), {"logits": p.clamp(min=1e-12).log()})


def test_accuracy_counts_exact_answers_that_end(tokenizer, processor):
    pictures, rows = shapes_qa.questions(0, 0, 90)
    greedy, sampled = tiny.vlm_accuracy(Oracle(tokenizer, rows), tokenizer, processor, pictures, rows)
    is_number = [row["metadata"]["tag"] == "counting" for row in rows]
    assert greedy.tolist() == [i % 3 == 0 and not number for i, number in enumerate(is_number)]
    expected = [(0.6, 0.4, 0.0)[i % 3] * (1 / 3 if number else 1) for i, number in enumerate(is_number)]
    torch.testing.assert_close(sampled, torch.tensor(expected), atol=1e-5, rtol=0)


def test_folder_that_is_written_loads_and_is_what_was_trained(tokenizer, processor, tmp_path):
    threads = torch.get_num_threads()
    tiny.make_qwen_vl(tmp_path, num_iterations=2, num_tower_iterations=2, eval_size=20)
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["iterations"], results["tower_iterations"], results["parameters"]) == (2, 2, 1_031_584)
    assert results["held_out_greedy"] < 0.05 and results["held_out_sampled"] < 0.05  # two iterations teach nothing
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    moved = {name: (p - q).abs().max() for (name, p), q in zip(model.named_parameters(), tiny.qwen_vl(0).parameters())}
    # Training started from qwen_vl(0): after two updates at 1/50 and 2/50 of 1e-3 Adam has moved no weight of the
    # language model by more than 6e-5, but for weight decay a thousand times smaller.
    assert all(0 < d < 6.2e-5 for name, d in moved.items() if "visual" not in name)
    assert all(d > 0 for name, d in moved.items() if "visual" in name)


def test_command_line_names_the_alias(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(tiny, "make_qwen_vl", lambda *arguments: calls.append(arguments))
    for extra in ([], ["--iterations", "7", "--seed", "3"]):
        monkeypatch.setattr(sys, "argv", ["tiny", "tiny-qwen-vl", "--out", str(tmp_path), *extra])
        tiny.main()
    assert calls == [(str(tmp_path), 0, 1000), (str(tmp_path), 3, 7)]


# ----------------------------------------------------------------------------------------------------------------------
# What is shipped


def test_shipped_folder_is_small_and_holds_no_pickle():
    sizes = {name: os.path.getsize(os.path.join(SHIPPED, name)) for name in os.listdir(SHIPPED)}
    assert sum(sizes.values()) < 6e6 and all(name.endswith((".json", ".jinja", ".safetensors")) for name in sizes)


def test_shipped_tokenizer_and_processor_are_the_ones_built_here(shipped, tokenizer, processor):
    model, t, p = shipped
    assert t.get_vocab() == tokenizer.get_vocab() and t.chat_template == tokenizer.chat_template
    assert p.to_dict() == processor.to_dict()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert (t.eos_token_id, t.pad_token_id, model.dtype) == (2, 0, torch.float32)


def test_shipped_model_reaches_its_accuracy_by_generate(shipped, results):
    model, t, p = shipped
    pictures, rows = shapes_qa.questions(0, 0, 512, "held_out")
    content = [[{"type": "image"}, {"type": "text", "text": row["prompt"]}] for row in rows]
    texts = [
        t.apply_chat_template([{"role": "user", "content": c}], tokenize=False, add_generation_prompt=True)
        for c in content
    ]
    texts = [text.replace("<|image_pad|>", "<|image_pad|>" * 16) for text in texts]
    tokens = t(texts, return_tensors="pt", padding=True)  # on the left
    inputs = {**tokens, **p(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")}
    inputs["mm_token_type_ids"] = (tokens.input_ids == model.config.image_token_id).int()
    out = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, tokens.input_ids.shape[1] :]
    replies = [reply.partition("<|im_end|>") for reply in t.batch_decode(out)]
    right = torch.tensor([r[:2] == (row["metadata"]["answer"], "<|im_end|>") for r, row in zip(replies, rows)])
    assert abs(right.float().mean().item() - results["held_out_greedy"]) <= 0.01
    greedy, sampled = tiny.vlm_accuracy(model, t, p, pictures, rows)
    assert (greedy != right).sum() <= 2  # a tie, at most
    assert sampled.mean().item() == pytest.approx(results["held_out_sampled"], abs=1e-3)
    score = rewards.load("shapes_qa")
    decoded = t.batch_decode(out, skip_special_tokens=True)
    assert torch.equal(score({"text": decoded}, [""] * 512, [row["metadata"] for row in rows]), right.float())


def test_shipped_model_is_a_start_for_reinforcement_learning(shipped, results):
    model, t, p = shipped
    pictures, rows = shapes_qa.questions(0, 0, 128, "held_out")
    inputs, labels = tiny.vlm_inputs(t, p, pictures, rows)
    with torch.no_grad():
        logits = model(**inputs).logits
    place = (labels >= 0).int().argmax(1) - 1  # where the word is predicted
    drawn = torch.distributions.Categorical(logits=logits[torch.arange(128), place]).sample((64,))
    right = (drawn == labels[torch.arange(128), place + 1]).float()
    # The end token is all but certain, so the word decides. 128 x 64 draws, the same questions on both sides.
    assert abs(right.mean() - tiny.vlm_accuracy(model, t, p, pictures, rows)[1].mean()) < 0.02
    assert results["held_out_sampled"] >= 0.25 and 0.4 <= results["held_out_greedy"] < 0.65
    # Where 8 answers to a question are neither all right nor all wrong, there is something to learn from.
    counts = right[:8].sum(0)
    assert ((counts > 0) & (counts < 8)).float().mean() > 0.5


def test_shipped_tower_tells_which_object_lies_where_to_a_linear_probe(shipped):
    model, _, p = shipped
    features, labels = [], []
    for side in ("train", "held_out"):
        pictures, drawn = shapes_qa.scenes(9, 0, 300, side)
        images = p(images=list(pictures), return_tensors="pt")
        with torch.no_grad():
            tokens = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        label = np.zeros((300, 4, 4, 4), int)  # class, colour (0 = nothing), row, column
        label[..., 2], label[..., 3] = np.arange(4)[:, None], np.arange(4)
        for i, (things, boxes) in enumerate(drawn):
            for (name, color), (x, y) in zip(things, (boxes[:, :2] + boxes[:, 2:]) / 2):
                what = shapes.CLASSES.index(name) + 1, list(shapes.COLORS).index(color) + 1
                label[i, int(y) // 8, int(x) // 8, :2] = what
        features.append(torch.cat([tokens, torch.ones(len(tokens), 1)], 1).double())
        labels.append(torch.from_numpy(label).flatten(0, 2))
    is_object = labels[1][:, 0] > 0
    for k, least in ((0, 0.9), (1, 0.9), (2, 0.9), (3, 0.9)):  # by chance: 1/3, 1/6, 1/4, 1/4
        target = torch.nn.functional.one_hot(labels[0][:, k]).double()
        probe = torch.linalg.lstsq(features[0], target).solution
        right = (features[1] @ probe).argmax(1) == labels[1][:, k]
        assert right[is_object].double().mean() > least, k
