"""The benchmark against TRL: its model, and what it says. Runs without TRL, in seconds."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import models
import rewards

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks", "vs_trl.py")


@pytest.fixture(scope="module")
def vs_trl():
    spec = importlib.util.spec_from_file_location("vs_trl", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_completions_have_64_tokens_and_rewards_that_differ(vs_trl, tmp_path):
    vs_trl.build(tmp_path, 2000)
    lm = models.load_lm(str(tmp_path), torch.device("cpu"), torch.float32)
    assert (len(lm.tokenizer), lm.parts["lm"].config.vocab_size, lm.stop_ids) == (2000, 2000, [])
    prompts = lm.encode(["34+57="] * 32)
    assert prompts[0] == [4, 5, 11, 6, 8, 12]
    out = lm.generate(prompts, 64, 1.0, torch.arange(32))
    assert out["mask"].shape == (32, 64) and out["mask"].all() and out["truncated"].all()
    reward = rewards.load("format")({"text": lm.decode(out["ids"], out["mask"])}, None, None)
    # Exactly one of 64 tokens an answer: 64 / 64 (63 / 64)^63 = 0.37 for tokens that are equally probable, +- 0.085.
    assert 0.1 < reward.mean() < 0.64


def test_ratios_are_those_of_neighbours_in_time(vs_trl):
    # The machine got slower by 10 from the first round to the third: the ratios are 2, 3 and 2, the ratio of medians 3.
    ours = [dict(seconds=s, cpu=1.0, peak=100) for s in (1.0, 5.0, 10.0)]
    trl = [dict(seconds=s, cpu=1.5, peak=400) for s in (2.0, 15.0, 20.0)]
    text = vs_trl.ratios(7, ours, trl)
    assert text == "vocabulary 7: 2.00 times as fast (1.50 in CPU time) with 25.0% of the memory"
    assert "at least 1.3 times" in vs_trl.ratios(2000, ours, trl)


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_a_missing_trl_is_one_line():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: this benchmark compares with TRL, which is not installed: pip install trl\n"
