"""What the language model and the autoencoder of tiny-blip3o are made of and trained on, and what the shipped model can
do; the numbers of its runs are in runs/results/tiny_blip3o*."""

import collections
import json
import re

import numpy as np
import pytest
import torch

import models
import rewards
from data import phrases, shapes, shapes_qa
from data import prompts as prompt_data
from models import blip3o, qwen, run_folder, tiny
from rewards.shapes import analyse

TASKS = ["question", "caption", "edit", "describe", "text_question"]
SMALL = dict(width=64, num_layers=1, num_heads=2, num_kv_heads=1, ff_dim=64)
SMALL |= dict(vision_width=32, vision_layers=2, vision_heads=2, vision_ff_dim=32)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.blip3o_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return tiny.qwen_vl_processor()


def small(tokenizer, seed=0):
    return tiny.qwen_vl(seed, **SMALL, tokenizer=tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and model


def test_every_word_of_the_world_is_one_token(tokenizer):
    edits = [e for e in shapes.all_edits() if e["tag"] != "move"]
    texts = {m["prompt"] for m in [*shapes.all_prompts(), *edits]}
    texts = [*texts, *shapes_qa.all_questions(), blip3o.DESCRIBE]
    texts += [phrases.user_prompt(m, np.random.default_rng(i)) for i, m in enumerate(shapes.all_prompts())]
    texts += [form.format(text) for form in (blip3o.T2I, blip3o.EDIT, blip3o.REFINE) for text in texts[::50]]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        # Words with the space before them, and runs of other characters.
        assert [tokenizer.decode(i) for i in ids] == re.findall(r" ?[a-zA-Z]+| ?[^a-zA-Z ]+", text)
    for word in phrases.all_words():
        assert len(tokenizer(word).input_ids) == len(tokenizer(f" {word}").input_ids) == 1, word
    text = "Kürbis 17 #!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text  # what it has no word for it can spell
    assert len(tokenizer) < 1000


def test_model_is_tiny_qwen_vl_with_more_words(tokenizer):
    model, same, other = tiny.blip3o_lm(0), tiny.blip3o_lm(0), tiny.qwen_vl(0)
    shape = {name: p.shape for name, p in model.named_parameters()}
    expected = {name: p.shape for name, p in other.named_parameters()}
    differ = [name for name in expected if shape[name] != expected[name]]
    assert list(shape) == list(expected) and differ == ["model.language_model.embed_tokens.weight"]
    assert shape[differ[0]][0] == len(tokenizer)
    assert abs(model.lm_head.weight.std().item() - 0.06) < 0.001 and model.lm_head.weight.requires_grad
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters()))
    assert not torch.equal(tiny.blip3o_lm(1).lm_head.weight, model.lm_head.weight)


def test_longest_turns_leave_room_for_answers_and_queries(tokenizer):
    longest = "i would like to see a mustard triangle on the left side of a charcoal triangle"
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": blip3o.REFINE.format(longest)}]}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert len(ids) + 64 + 16 + 64 < tokenizer.model_max_length


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


def test_objects_are_listed_in_the_order_of_the_tokens_of_the_picture():
    things = [("circle", "red"), ("square", "blue"), ("triangle", "black"), ("circle", "green")]
    boxes = np.array([[20, 2, 28, 10], [2, 3, 12, 13], [2, 16, 12, 26]])  # centres (24, 6), (7, 8), (7, 21)
    # In tokens of 8 x 8 px: (3, 0), (0, 1), (0, 2); the fourth has no box.
    expected = "a red circle, a blue square, a black triangle, a green circle"
    assert tiny.list_objects(things, boxes) == expected
    assert tiny.list_objects(things[:2], boxes[1::-1]) == "a blue square, a red circle"
    assert tiny.list_objects(things[:1], boxes[:1]) == "a red circle" and tiny.list_objects([], boxes[:0]) == ""
    # No two objects of a picture share a token, else their order would be arbitrary.
    for _, boxes in shapes_qa.scenes(3, 0, 200)[1]:
        centres = (boxes[:, :2] + boxes[:, 2:]) // 16
        assert len({tuple(centre) for centre in centres.tolist()}) == len(boxes)


def test_questions_about_captions():
    by_text = {m["prompt"]: dict(tiny.text_questions(m)) for m in shapes.all_prompts()}
    assert by_text["three circles"] == {"how many circles?": "3"}
    assert by_text["a circle and a square"] == {"how many circles?": "1", "how many squares?": "1"}
    expected = {"how many squares?": "2", "how many red shapes?": "2", "what color is the square?": "red"}
    assert by_text["two red squares"] == expected | {"what shape is red?": "square"}
    asked = {"how many circles?": "2", "how many red shapes?": "1", "how many blue shapes?": "1"}
    asked |= {"what shape is red?": "circle", "what shape is blue?": "circle"}
    left = {"what color is the leftmost shape?": "red", "what color is the rightmost shape?": "blue"}
    assert by_text["a red circle left of a blue circle"] == asked | left
    assert by_text["a blue circle right of a red circle"] == asked | left
    high = {"what color is the highest shape?": "blue", "what color is the lowest shape?": "red"}
    assert by_text["a red circle below a blue circle"] == asked | high
    assert by_text["a blue circle above a red circle"] == asked | high
    assert all(by_text.values())
    known = set(shapes_qa.all_questions())
    assert all(q in known and a in shapes_qa.all_answers() for asked in by_text.values() for q, a in asked.items())


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_a_stream_that_can_be_cut_anywhere(task):
    pictures, rows = tiny.lm_rows(task, 5, 0, 12)
    ends = [tiny.lm_rows(task, 5, 0, 5), tiny.lm_rows(task, 5, 5, 7)]
    assert rows == ends[0][1] + ends[1][1] and len(rows) == len(pictures) == 12
    again = ends[0][0] + ends[1][0]
    assert all((a is None and b is None) or (a == b).all() for a, b in zip(pictures, again))
    assert tiny.lm_rows(task, 6, 0, 12)[1] != rows or task == "describe"
    assert [picture is not None for picture in pictures] == [task not in ("caption", "text_question")] * 12


def things_of(picture):
    return collections.Counter(f"a {o['color']} {o['class']}" for o in analyse(picture))


def edited(things, instruction):
    words = instruction.split()
    things, new = things.copy(), f"a {words[2]} {words[3]}"
    if words[0] != "add":
        things[new] -= 1
    if words[0] == "make":
        things[f"a {words[4]} {words[3]}"] += 1
    if words[0] == "turn":
        things[f"a {words[2]} {words[6]}"] += 1
    if words[0] == "add":
        things[new] += 1
    return +things


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_right_and_on_their_side(held_out):
    side = "held_out" if held_out else "train"
    captions = {m["prompt"] for m in (shapes.held_out_prompts() if held_out else shapes.train_prompts())}
    instructions = {e["prompt"] for e in (shapes.held_out_edits() if held_out else shapes.train_edits())}
    count, scenes = 150, set()
    for picture, row in zip(*tiny.lm_rows("edit", 0, 0, count, held_out)):
        instruction = row["prompt"].removeprefix(blip3o.EDIT.format(""))
        before, after = things_of(picture), collections.Counter(row["metadata"]["answer"].split(", "))
        assert instruction in instructions and edited(before, instruction) == after
        assert shapes_qa.side_of([tuple(thing.split()[:0:-1]) for thing in before]) == side
        scenes.add(frozenset(before))
    # Of scenes of one object none is held out both in data/shapes.py and in data/shapes_qa.py.
    assert {len(scene) for scene in scenes} == ({2, 3} if held_out else {1, 2, 3})
    other = shapes.held_out_edits() if not held_out else shapes.train_edits()
    assert not scenes & {frozenset(f"a {i['color']} {i['class']}" for i in e["source"]) for e in other}
    for picture, row in zip(*tiny.lm_rows("describe", 0, 0, count, held_out)):
        answer = row["metadata"]["answer"].split(", ")
        assert row["prompt"] == blip3o.DESCRIBE and things_of(picture) == collections.Counter(answer)
        assert shapes_qa.side_of([tuple(thing.split()[:0:-1]) for thing in answer]) == side
    by_text, as_it_is, lists = {m["prompt"]: m for m in shapes.all_prompts()}, [], 0
    for _, row in zip(*tiny.lm_rows("caption", 0, 0, count, held_out)):
        said, told = row["prompt"].removeprefix(blip3o.T2I.format("")), row["metadata"]["answer"]
        as_it_is.append(said == told)
        if "," not in told:
            assert told in captions and phrases.canonical(said) == told
            continue
        lists += 1
        said, told = said.split(", "), told.split(", ")
        assert len(told) == 3 and [phrases.canonical(thing) for thing in said] == told
        assert all(len(by_text[thing]["include"]) == 1 for thing in told)
    assert 0.4 < lists / count < 0.6 and 0.4 < np.mean(as_it_is) < 0.6
    for _, row in zip(*tiny.lm_rows("text_question", 0, 0, count, held_out)):
        said, question = row["prompt"].split(". ")
        caption = phrases.canonical(said)
        assert caption in captions
        assert (question, row["metadata"]["answer"]) in tiny.text_questions(by_text[caption])
    pictures, rows = shapes_qa.questions(0, 0, 10, side)
    same = tiny.lm_rows("question", 0, 0, 10, held_out)
    assert same[1] == rows and (np.array(same[0]) == pictures).all()


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_rows_without_pictures_stand_beside_rows_with(tokenizer, processor):
    """Next-token losses of a mixed batch are those of every row on its own."""
    batch = [tiny.lm_rows(task, 1, 0, 2) for task in TASKS]
    pictures, rows = (sum(parts, []) for parts in zip(*batch))
    model = small(tokenizer).eval()

    def logps(pictures, rows):
        inputs, labels = tiny.vlm_inputs(tokenizer, processor, pictures, rows)
        with torch.no_grad():
            logp = model(**inputs).logits[:, :-1].log_softmax(-1)
        kept = labels[:, 1:] >= 0
        return torch.split(logp[kept].gather(-1, labels[:, 1:][kept][:, None])[:, 0], kept.sum(1).tolist())

    together = logps(pictures, rows)
    for picture, row, logp in zip(pictures, rows, together):
        torch.testing.assert_close(logps([picture], [row])[0], logp, atol=1e-5, rtol=0)
    inputs, labels = tiny.vlm_inputs(tokenizer, processor, [None], tiny.lm_rows("caption", 1, 0, 1)[1])
    row = tiny.lm_rows("caption", 1, 0, 1)[1][0]
    assert set(inputs) == {"input_ids", "mm_token_type_ids"} and not inputs["mm_token_type_ids"].any()
    text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['metadata']['answer']}<|im_end|>"
    assert inputs["input_ids"][0].tolist() == tokenizer(text).input_ids
    end = tokenizer(row["metadata"]["answer"] + "<|im_end|>").input_ids
    assert labels[0].tolist() == [-100] * (labels.shape[1] - len(end)) + end


def test_training_lowers_the_loss_repeats_bit_for_bit_and_leaves_a_frozen_tower(tokenizer, processor):
    runs = []
    for seed in (0, 0, 1):
        model = small(tokenizer)
        model.model.visual.requires_grad_(False)
        out = tiny.train_blip3o_lm(
            model, tokenizer, processor, tiny.LM_TASKS, seed, 15, batch_size=10, learning_rate=1e-2
        )
        assert not model.training and out["iterations"] == len(out["losses"]) == 15
        runs.append((out["losses"], model.state_dict()))
    losses = runs[0][0]
    assert abs(losses[0] - np.log(len(tokenizer))) < 0.3 and np.mean(losses[-3:]) < losses[0] - 2
    assert losses == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], p) for name, p in runs[1][1].items())
    for name, p in small(tokenizer).state_dict().items():
        assert torch.equal(runs[0][1][name], p) == ("visual" in name), name


def test_made_folder_holds_a_model_that_answers_as_its_results_say(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "blip3o_lm", lambda seed: small(tiny.blip3o_tokenizer(), seed))
    threads = torch.get_num_threads()
    tiny.make_blip3o_lm(str(tmp_path), 0, 2, 2, 2, eval_size=12)
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "results.json").read_text())
    accuracies = {f"held_out_{task}" for task in TASKS}
    expected = {"seed", "parameters", "tower_iterations", "tower_accuracy", "question_iterations", "iterations"}
    expected |= accuracies
    assert set(results) == expected | {"held_out_question_by_tag", "most_frequent_answer"}
    assert results["iterations"] == results["tower_iterations"] == 2 and all(0 <= results[a] <= 1 for a in accuracies)
    answers = [row["metadata"]["answer"] for row in tiny.lm_rows("question", 0, 0, 12, True)[1]]
    most = collections.Counter(answers).most_common(1)[0][1]
    assert results["most_frequent_answer"] == round(most / 12, 4)
    lm = qwen.load(str(tmp_path), "cpu", torch.float32)
    parts = lm.parts["lm"], lm.tower
    assert results["parameters"] == sum(p.numel() for part in parts for p in part.parameters())


def test_deep_autoencoder_is_trained_and_scaled():
    """A few iterations: the loss falls, latents have variance 1, the same seed gives the same weights."""
    runs = []
    for seed in (0, 0):
        vae = tiny.blip3o_sana(seed).vae
        pictures = torch.from_numpy(shapes.pictures(9, 0, 64)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            before = (vae(pictures).sample - pictures).square().mean()
        results = tiny.train_deep_autoencoder(vae, seed, num_iterations=12, batch_size=8)
        with torch.no_grad():
            latents, after = vae.encode(pictures).latent, (vae(pictures).sample - pictures).square().mean()
        assert results["iterations"] == 12 and after < 0.8 * before
        assert 0.8 < (latents * vae.config.scaling_factor).std() < 1.2
        runs.append(vae.state_dict())
    assert all(torch.equal(p, runs[1][name]) for name, p in runs[0].items())


def test_shipped_model_draws_edits_and_answers():
    """On 64 held-out prompts of each kind, where the runs of runs/tiny_blip3o.sh are measured on more."""
    model = models.load("tiny-blip3o", "cpu", torch.float32)
    score, sigmas, seeds = rewards.load("shapes"), model.sigmas(12, 32, 32), torch.arange(64)
    for world, least in (("shapes", 0.2), ("shapes-edit", 0.25)):
        held_out = prompt_data.load(world, "eval")
        rows = [held_out[i] for i in prompt_data.order(len(held_out), 0, 0, 64)]
        prompts, metadata = [row["prompt"] for row in rows], [row["metadata"] for row in rows]
        with torch.no_grad():
            cond = model.condition(model.encode(prompts, prompt_data.images(rows, 32, 32), seeds=seeds))
            x = model.init_noise(seeds, 32, 32)
            for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
                x = x + model.velocity(x, torch.full((64,), sigma), cond, (2.0, 1.0)) * (sigma_next - sigma)
            pictures = run_folder.to_uint8(model.decode(x))
        assert score.strict({"image": pictures}, prompts, metadata).mean() >= least, world
    held_out = prompt_data.load("shapes-qa", "eval")
    rows = [held_out[i] for i in prompt_data.order(len(held_out), 0, 0, 64)]
    prompts, metadata = [row["prompt"] for row in rows], [row["metadata"] for row in rows]
    encoded = model.lm.encode(prompts, 4, [row["image"] for row in rows])
    said = model.lm.generate(encoded, 4, 0.0, seeds)
    texts = model.lm.decode(said["ids"], said["mask"])
    assert rewards.load("shapes_qa")({"text": texts}, prompts, metadata).mean() >= 0.7
    held_out = prompt_data.load("shapes-user", "eval")
    asked = [held_out[i]["prompt"] for i in prompt_data.order(len(held_out), 0, 0, 64)]
    said = model.lm.generate(model.lm.encode([blip3o.REFINE.format(text) for text in asked], 24), 24, 0.0, seeds)
    texts = [blip3o.refined(text) for text in model.lm.decode(said["ids"], said["mask"])]
    assert np.mean([text == phrases.canonical(prompt) for text, prompt in zip(texts, asked)]) >= 0.5
