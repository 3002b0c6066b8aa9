import math
import os

import pytest
import torch

from models.cache import EmbeddingCache


class Encoder:
    """Rows that spell their prompt, and a record of what was asked for."""

    def __init__(self):
        self.chunks = []

    def __call__(self, prompts):
        self.chunks.append(list(prompts))
        letters = [[ord(c) for c in prompt.ljust(8)[:8]] for prompt in prompts]
        t5 = torch.tensor(letters, dtype=torch.float32).view(-1, 4, 2)
        return {"t5": t5.bfloat16(), "clip": t5.sum((1, 2)).view(-1, 1) / math.pi}

    def asked(self):
        prompts = [prompt for chunk in self.chunks for prompt in chunk]
        self.chunks.clear()
        return prompts


def refuse(prompts):
    raise AssertionError(f"encoded {prompts}, which should have been cached")


def assert_rows(rows, prompts):
    expected = Encoder()(prompts)
    assert rows.keys() == expected.keys()
    for name in expected:
        assert rows[name].dtype == expected[name].dtype and torch.equal(rows[name], expected[name])


def test_rows_follow_the_order_of_the_prompts_and_repeats_are_encoded_once():
    encode = Encoder()
    cache = EmbeddingCache(encode)
    assert_rows(cache(["b", "a", "b", ""]), ["b", "a", "b", ""])
    assert encode.asked() == ["b", "a", ""]
    assert_rows(cache(["", "c", "a"]), ["", "c", "a"])
    assert encode.asked() == ["c"]


def test_missing_prompts_are_encoded_in_chunks():
    encode = Encoder()
    cache = EmbeddingCache(encode)
    prompts = [f"p{i}" for i in range(7)]
    assert_rows(cache(prompts, batch_size=3), prompts)
    assert [len(chunk) for chunk in encode.chunks] == [3, 3, 1]


def test_least_recently_used_prompt_goes_first():
    encode = Encoder()
    cache = EmbeddingCache(encode, max_prompts=3)
    for prompt in ("a", "b", "c", "a", "d"):  # "a" was used after "b": "b" goes
        cache([prompt])
    encode.asked()
    cache(["a", "c", "d"])
    assert encode.asked() == []
    cache(["b"])  # "a" is the oldest of a, c, d
    assert encode.asked() == ["b"]
    cache(["c", "d", "b"])
    assert encode.asked() == []
    cache(["a"])
    assert encode.asked() == ["a"]


@pytest.mark.parametrize("max_prompts", [0, 2])
def test_a_call_may_ask_for_more_prompts_than_the_cache_holds(max_prompts):
    cache = EmbeddingCache(Encoder(), max_prompts=max_prompts)
    prompts = [f"p{i}" for i in range(5)]
    assert_rows(cache(prompts), prompts)
    assert len(cache.rows) == max_prompts


def test_a_cached_row_holds_its_own_memory_only():
    cache = EmbeddingCache(Encoder())
    cache([f"p{i}" for i in range(5)])
    for row in cache.rows.values():
        assert row["t5"].untyped_storage().nbytes() == 8 * 2  # a view would keep the whole batch alive


def test_changing_what_was_returned_does_not_change_the_cache():
    cache = EmbeddingCache(Encoder())
    cache(["a"])["t5"].zero_()
    assert_rows(cache(["a"]), ["a"])


def test_folder_survives_the_cache_and_eviction(tmp_path):
    folder = tmp_path / "new" / "embeddings"
    prompts = ["", "a/b", "ünï\n", "x" * 5000, "a"]
    EmbeddingCache(Encoder(), max_prompts=1, folder=folder)(prompts)
    assert len(os.listdir(folder)) == len(prompts)  # no temporary file stays
    again = EmbeddingCache(refuse, max_prompts=1, folder=folder)
    assert_rows(again(prompts[::-1]), prompts[::-1])
    assert_rows(again(prompts), prompts)


def test_without_a_folder_nothing_survives():
    EmbeddingCache(Encoder())(["a"])
    with pytest.raises(AssertionError, match="should have been cached"):
        EmbeddingCache(refuse)(["a"])
