"""The addition task, tiny-qwen's tokenizer and training, and the weights that are shipped in assets/tiny-qwen."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import arithmetic
from models import tiny
from rewards import math as reward

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = os.path.join(ROOT, "assets", "tiny-qwen")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.arithmetic_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def results():
    with open(os.path.join(ROOT, "runs", "results", "tiny_qwen.json")) as file:
        return json.load(file)


# ----------------------------------------------------------------------------------------------------------------------
# Problems


def test_split_is_disjoint_complete_and_of_the_sizes_said():
    sides = [arithmetic.train_problems(), arithmetic.validation_problems(), arithmetic.held_out_problems()]
    assert [len(side) for side in sides] == [7300, 300, 500]
    prompts = [row["prompt"] for side in sides for row in side]
    assert len(set(prompts)) == 8100
    assert set(prompts) == {f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)}
    assert prompts != [row["prompt"] for row in arithmetic.all_problems()]


def test_split_keeps_a_sum_and_its_mirror_image_on_one_side():
    for side in (arithmetic.train_problems(), arithmetic.validation_problems(), arithmetic.held_out_problems()):
        pairs = {tuple(row["prompt"][:-1].split("+")) for row in side}
        assert pairs == {(b, a) for a, b in pairs}


def test_split_is_the_same_in_another_process_and_spreads_over_all_sums():
    # Ordering by Python's own hash() would differ from process to process.
    code = "from data import arithmetic as a; print(*(r['prompt'] for r in a.held_out_problems()))"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    held_out = arithmetic.held_out_problems()
    assert output.stdout.decode().split() == [row["prompt"] for row in held_out]
    # The sums of two uniform numbers of 10 ... 99 have mean 109 and standard deviation 36.7; 500 of them (in mirrored
    # twos, so some 250 independent ones) a standard error of 2.3.
    answers = torch.tensor([float(row["metadata"]["answer"]) for row in held_out])
    assert abs(answers.mean() - 109) < 10 and 30 < answers.std() < 43


def test_prompts_have_six_characters_and_right_answers():
    rows = arithmetic.all_problems()
    assert {"prompt": "34+57=", "metadata": {"answer": 91}} in rows
    for row in rows:
        a, b = row["prompt"][:2], row["prompt"][3:5]
        assert row["prompt"] == f"{a}+{b}=" and len(row["prompt"]) == 6 and list(row) == ["prompt", "metadata"]
        assert row["metadata"] == {"answer": int(a) + int(b)}


def test_rows_of_two_calls_are_not_shared():
    arithmetic.held_out_problems()[0]["metadata"]["answer"] = -1
    assert arithmetic.held_out_problems()[0]["metadata"]["answer"] > 0


def test_stream_is_a_function_of_seed_and_index_over_training_problems():
    whole = arithmetic.stream(3, 0, 300)
    assert arithmetic.stream(3, 100, 50) == whole[100:150]
    assert arithmetic.stream(4, 0, 300) != whole and arithmetic.stream(3, 5, 0) == []
    train = {row["prompt"] for row in arithmetic.train_problems()}
    assert all(row["prompt"] in train for row in whole) and len({row["prompt"] for row in whole}) > 280
    held_out = arithmetic.held_out_problems()
    assert all(row in held_out for row in arithmetic.stream(3, 0, 20, held_out))


def test_math_reward_accepts_the_answer_and_nothing_else():
    rows = arithmetic.held_out_problems()[:50]
    prompts, metadata = [row["prompt"] for row in rows], [row["metadata"] for row in rows]
    score = reward.load()
    right = score({"text": [str(item["answer"]) for item in metadata]}, prompts, metadata)
    wrong = score({"text": [str(item["answer"] + 10) for item in metadata]}, prompts, metadata)
    assert right.tolist() == [1.0] * 50 and wrong.tolist() == [0.0] * 50


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_tokenizer_gives_every_character_its_own_token_and_reads_it_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    for t in (tokenizer, loaded):
        ids = t(tiny.CHARACTERS).input_ids
        assert len(ids) == len(set(ids)) == len(tiny.CHARACTERS) == 27 and len(t) == 29
        assert not set(ids) & {t.eos_token_id, t.pad_token_id}
        assert t.decode(ids) == tiny.CHARACTERS
        for row in arithmetic.all_problems()[::97]:
            text = f"{row['prompt']}{row['metadata']['answer']}"
            assert [t.decode([i]) for i in t(text).input_ids] == list(text)
        # Runs of digits, spaces and newlines are where a pre-tokenizer could merge or lose something.
        for text in ("", "1234567890", "  1 +\n\n 2 = ", "(3-4)*5/6%7^8<9>0.1,2:?", " \n \n"):
            assert t.decode(t(text).input_ids) == text and len(t(text).input_ids) == len(text)


def test_tokenizer_has_end_and_padding_tokens_that_decoding_can_skip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (t.eos_token, t.eos_token_id, t.pad_token, t.pad_token_id) == ("<|endoftext|>", 0, "<|pad|>", 1)
        assert t("91<|endoftext|>").input_ids[-1] == 0 and t("34+57=").input_ids[-1] != 0  # nothing is added unasked
        batch = t(["34+57=", "1"], padding=True, return_tensors="pt")
        assert batch.input_ids[1, :5].tolist() == [1] * 5 and batch.attention_mask.sum(1).tolist() == [6, 1]  # left
        assert t.decode([1, 1, *t("91").input_ids, 0], skip_special_tokens=True) == "91"


def test_chat_template_is_the_plain_prompt(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    user, reply = {"role": "user", "content": "34+57="}, {"role": "assistant", "content": "91"}
    system = {"role": "system", "content": "Add."}
    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for messages in ([user], [system, user]):
            assert t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "34+57="
        ids = t.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == t("34+57=").input_ids
        assert t.apply_chat_template([user, reply], tokenize=False) == "34+57=91<|endoftext|>"


# ----------------------------------------------------------------------------------------------------------------------
# Model and training


def test_qwen_lm_has_the_dimensions_said_and_depends_on_the_seed_only(tokenizer):
    state = torch.get_rng_state()
    a, b, c = tiny.qwen_lm(0), tiny.qwen_lm(0), tiny.qwen_lm(1)
    assert torch.equal(torch.get_rng_state(), state)
    # Per layer: q, k, v with bias, o, three feed-forward matrices, two norms; the embedding counts once.
    layer = 3 * (128 * 128 + 128) + 128 * 128 + 3 * 128 * 512 + 2 * 128
    assert sum(p.numel() for p in a.parameters()) == 3 * layer + 29 * 128 + 128 == 792_192
    assert a.lm_head.weight is a.model.embed_tokens.weight
    assert (a.config.eos_token_id, a.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.model.embed_tokens.weight, c.model.embed_tokens.weight)


def test_training_lowers_the_loss_and_repeats_bit_for_bit(tokenizer):
    runs = []
    for seed in (0, 0, 1):
        model = tiny.qwen_lm(0, width=32, num_layers=1, num_heads=2, num_kv_heads=1, ff_dim=64)
        out = tiny.train_lm(model, tokenizer, seed, num_iterations=40, batch_size=32, learning_rate=1e-2, warmup=5)
        runs.append((out, [p.detach().clone() for p in model.parameters()]))
    losses = runs[0][0]["losses"]
    assert len(losses) == runs[0][0]["iterations"] == 40
    # Before training every one of 29 tokens is about as likely as any other: ln 29 = 3.37. Digits at random cost at
    # most ln 10 = 2.30, the end token nothing once it is learnt, so knowing the format alone gets below 2.
    assert abs(losses[0] - 3.37) < 0.3 and sum(losses[-5:]) / 5 < 2.0
    assert runs[0][0] == runs[1][0] and all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1]))
    assert runs[2][0]["losses"] != losses


def test_training_stops_at_the_accuracy_asked_for(tokenizer):
    model = tiny.qwen_lm(0, width=32, num_layers=1, num_heads=2, num_kv_heads=1, ff_dim=64)
    out = tiny.train_lm(model, tokenizer, num_iterations=9, batch_size=8, stop_accuracy=0.0, eval_every=4)
    assert out["iterations"] == 4 and not model.training


class Oracle(torch.nn.Module):
    """Answers every sum, but all whose first digit is 1 wrongly, without an end token those whose first digit is 2."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 29)
        for row, ids in enumerate(input_ids):
            text = self.tokenizer.decode(ids)
            answer = str(int(text[:2]) + int(text[3:5]) + (text[0] == "1"))
            answer += "000" if text[0] == "2" else "<|endoftext|>"
            target = self.tokenizer(text[:6] + answer + "<|endoftext|>" * 4).input_ids
            logits[row, -1, target[len(ids)]] = 50.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accuracy_counts_exact_answers_that_end(tokenizer, temperature):
    problems = arithmetic.held_out_problems()
    expected = sum(row["prompt"][0] not in "12" for row in problems) / len(problems)
    assert tiny.arithmetic_accuracy(Oracle(tokenizer), tokenizer, problems, temperature) == expected


def test_command_line_writes_a_folder_that_loads(tmp_path, monkeypatch):
    threads, folder = torch.get_num_threads(), tmp_path / "lm"
    monkeypatch.setattr(sys, "argv", ["tiny", "tiny-qwen", "--out", str(folder), "--iterations", "2"])
    tiny.main()
    torch.set_num_threads(threads)
    model, results = AutoModelForCausalLM.from_pretrained(folder), json.loads((folder / "results.json").read_text())
    assert results["iterations"] == 2 and results["held_out_greedy"] < 0.05  # two iterations teach nothing
    # Training started from qwen_lm(0): after two updates at 1/50 and 2/50 of 1e-3 Adam has moved no weight by more
    # than 6e-5, but for weight decay a thousand times smaller.
    for before, after in zip(tiny.qwen_lm(0).parameters(), model.parameters()):
        assert 0 < (before - after).abs().max() < 6.2e-5


# ----------------------------------------------------------------------------------------------------------------------
# What is shipped


def test_shipped_folder_is_small_and_holds_no_pickle():
    sizes = {name: os.path.getsize(os.path.join(SHIPPED, name)) for name in os.listdir(SHIPPED)}
    assert sum(sizes.values()) < 4e6 and all(name.endswith((".json", ".jinja", ".safetensors")) for name in sizes)


def test_shipped_tokenizer_is_the_one_built_here(shipped, tokenizer):
    assert shipped[1].get_vocab() == tokenizer.get_vocab() and shipped[1].chat_template == tokenizer.chat_template
    assert shipped[0].generation_config.eos_token_id == 0 and shipped[0].generation_config.pad_token_id == 1


def test_shipped_model_reaches_its_greedy_accuracy_by_generate(shipped, results):
    model, tokenizer = shipped
    problems = arithmetic.held_out_problems()
    chats = [[{"role": "user", "content": row["prompt"]}] for row in problems]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**batch, do_sample=False, max_new_tokens=4)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
    ends = [answer.partition("<|endoftext|>")[:2] for answer in answers]
    right = [end == (str(row["metadata"]["answer"]), "<|endoftext|>") for end, row in zip(ends, problems)]
    accuracy = sum(right) / len(right)
    assert abs(accuracy - results["held_out_greedy"]) <= 0.02
    assert accuracy == pytest.approx(tiny.arithmetic_accuracy(model, tokenizer, problems), abs=0.002)  # a tie, at most


def test_shipped_model_is_a_start_for_reinforcement_learning(shipped, results):
    sampled = tiny.arithmetic_accuracy(*shipped, arithmetic.held_out_problems() * 4, temperature=1.0, seed=5)
    # Two means of 2,000 and 4,000 draws that are right with probability .28: 3 standard errors of their difference.
    assert abs(sampled - results["held_out_sampled"]) < 0.037
    assert sampled >= 0.25 and 0.45 <= results["validation_accuracy"] < 0.65 and results["held_out_greedy"] < 0.65
