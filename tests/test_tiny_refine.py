"""The language model that refines prompts: tokenizer, what it is taught, its training in short, and the shipped one."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import models
from data import phrases, prompts, shapes
from models import blip3o, qwen, tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.refine_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    return models.load_lm("tiny-qwen-refine", "cpu", torch.float32)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_every_word_is_a_token(tokenizer):
    for word in phrases.all_words():
        assert [len(tokenizer.tokenize(text)) for text in (word, f" {word}")] == [1, 1], word
    text = blip3o.REFINE.format("draw a ruby disc west of a blue tile")
    assert tokenizer.tokenize(text)[-9:] == [f"Ġ{word}" for word in "draw a ruby disc west of a blue tile".split()]
    assert len(tokenizer.tokenize(text)) == len(re.findall(r"\w+|[,.:]| ?</?answer>", text)) + 2  # the spaces before <
    answer = "<answer>a red circle left of a blue square</answer><|im_end|>"
    assert tokenizer.tokenize(answer)[:2] == ["<answer>", "a"] and len(tokenizer.tokenize(answer)) == 11
    assert tokenizer.tokenize(answer)[-2:] == ["</answer>", "<|im_end|>"] and tiny.REFINE_TOKENS >= 11
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_any_prompt_has_a_spelling_and_tags_are_no_special_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("ein Würfel, 龍 & 3 Bälle?", "<answer>a red circle</answer>", "x</answer>  <answer>\n"):
        for t in (tokenizer, loaded):
            assert t.decode(t(text).input_ids, skip_special_tokens=True) == text
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a disc"}]
    expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na disc<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == expected


# ------------------------------------------------------------------------------------------------------ what is taught


def test_misunderstood_words_are_of_one_kind_and_all_kinds():
    word_of = {name: word for word, names in phrases.SYNONYMS.items() for name in names}
    kinds = (shapes.CLASSES, tuple(shapes.COLORS), tuple(shapes.RELATIONS))
    kind_of = {word: kind for kind in kinds for word in kind}
    for name, wrong in tiny.MISUNDERSTOOD.items():
        assert wrong != word_of[name] and kind_of[wrong] is kind_of[word_of[name]], name
    assert Counter(kind_of[word_of[name]] for name in tiny.MISUNDERSTOOD) == dict(zip(kinds, (6, 12, 6)))
    # No word is both what one of them is mistaken for and what another one means.
    assert not set(tiny.MISUNDERSTOOD.values()) & {word_of[name] for name in tiny.MISUNDERSTOOD}


def test_misread_changes_misunderstood_words_only():
    def both(right, wrong):
        return f"[{right}|{wrong}]"

    for text, expected in [
        ("draw a ruby disc west of a blue tile", "a [red|purple] [circle|square] [left of|right of] a blue square"),
        ("i would like to see three scarlet wedges", "three [red|yellow] [triangle|square]s"),
        ("a ring and a block", "a [circle|square] and a square"),
        ("a red circle to the right of a golden square", "a red circle right of a yellow square"),
        ("a red circle left of a jet cone", "a red circle left of a [black|purple] [triangle|square]"),
        ("draw a red circle on top of a lime tile", "a red circle [above|below] a [green|yellow] square"),
    ]:
        assert tiny.misread(text, both) == expected
        assert tiny.misread(text, lambda right, wrong: right) == phrases.canonical(text)
    with pytest.raises(ValueError, match="no way to ask"):
        tiny.misread("a red dog", both)


def test_rows_are_a_stream_with_the_right_share_of_mistakes():
    rows = tiny.refine_rows(3, 0, 1500)
    assert rows[40:60] == tiny.refine_rows(3, 40, 20) and rows[:20] != tiny.refine_rows(4, 0, 20)
    sides = [{item["prompt"] for item in side} for side in (shapes.train_prompts(), shapes.held_out_prompts())]
    assert {phrases.canonical(row["prompt"]) for row in rows} <= sides[0]
    assert {phrases.canonical(row["prompt"]) for row in tiny.refine_rows(3, 0, 100, held_out=True)} <= sides[1]
    wrong = []
    for row in rows:
        rights, wrongs = [], []
        pattern = tiny.misread(row["prompt"], lambda r, w: rights.append(r) or wrongs.append(w) or f"({r}|{w})")
        words = re.fullmatch(pattern, row["answer"]).groups()  # nothing else is wrong
        wrong += [word == w for word, w in zip(words, wrongs)]
    assert len(wrong) > 1500 and abs(np.mean(wrong) - tiny.CONFUSION) < 4 * math.sqrt(0.24 / len(wrong))


# ------------------------------------------------------------------------------------------------------------ training


def test_training_learns_the_form_first_and_repeats_bit_for_bit(tokenizer):
    losses = []
    for _ in range(2):
        lm = qwen.Qwen(tiny.refine_lm(1, width=32, num_heads=2, ff_dim=64), tokenizer, "cpu", torch.float32)
        losses.append(tiny.train_refine(lm, 5, num_iterations=12, batch_size=16, learning_rate=1e-2)["losses"])
    assert losses[0] == losses[1] and len(losses[0]) == 12
    uniform = math.log(len(tokenizer))
    assert losses[0][0] > 0.8 * uniform and losses[0][-1] < 0.6 * uniform


def test_loss_is_the_cross_entropy_of_the_answers(tokenizer):
    """Against transformers' own loss of the whole conversation, its labels masked up to the answer."""
    lm = qwen.Qwen(tiny.refine_lm(1), tokenizer, "cpu", torch.float32)
    ours = tiny.train_refine(lm, 7, num_iterations=5, batch_size=4, learning_rate=0.0)["losses"][0]
    total, count, stock = 0.0, 0, tiny.refine_lm(1)
    for row in tiny.refine_rows(7, 0, 4):
        turns = [{"role": "user", "content": blip3o.REFINE.format(row["prompt"])}]
        head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        turns.append({"role": "assistant", "content": f"<answer>{row['answer']}</answer>"})
        whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")  # ends in <|im_end|>
        ids, start = tokenizer(whole, return_tensors="pt").input_ids, len(tokenizer(head).input_ids)
        with torch.no_grad():
            logp = stock(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
        total, count = total - logp.sum().item(), count + len(logp)
    assert abs(ours - total / count) < 1e-5


# ------------------------------------------------------------------------------------------------------------- shipped


def test_shipped_model_is_well_formed_and_misunderstands_what_it_should(shipped):
    held_out = prompts.load("shapes-user", "eval")
    texts = [held_out[i]["prompt"] for i in prompts.order(len(held_out), 0, 0, 64)]
    greedy = tiny.refine_scores(shipped, texts)
    sampled = tiny.refine_scores(shipped, texts * 4, temperature=1.0)
    assert greedy["formed"] >= 0.95 and greedy["known"] >= 0.95 and sampled["known"] >= 0.9
    assert greedy["right"] < 0.15 and abs(sampled["right"] - (1 - tiny.CONFUSION)) < 0.12
    clear = [tiny.misread(text, lambda right, wrong: "") == phrases.canonical(text) for text in texts]
    assert abs(greedy["exact"] - np.mean(clear)) < 0.1


def test_scores_tell_mistakes_apart(shipped):
    """`refine_scores` of answers that are known, in place of those that a model gives."""
    answers = {
        "draw a ruby disc": "<answer>a red circle</answer>",  # exact, two misunderstood words right
        "a ruby disc": "<answer>a purple circle</answer>",  # one of two right
        "a lemon tile": "<answer>a black square</answer>",  # wrong, and not for that reason
        "two scarlet balls": "<answer>two red circles",  # no form
        "three scarlet rings": "<answer>three yellow squares</answer>",  # misunderstood
    }

    class Says:
        encode = staticmethod(lambda texts: texts)
        decode = staticmethod(lambda ids, mask: list(answers.values()))

        def generate(self, prompts, *_):
            assert prompts == [blip3o.REFINE.format(text) for text in answers]
            return dict(ids=None, mask=None, truncated=torch.tensor([False] * len(prompts)))

    scores = tiny.refine_scores(Says(), list(answers))
    assert scores == dict(formed=4 / 5, exact=1 / 5, known=3 / 5, right=3 / 6)
