import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
import rewards.format as tags
import rewards.math as maths
from rewards import recon

ROOT = Path(__file__).parents[1]


def noise(seed, height=9, width=13):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# psnr, recon


def test_psnr_is_minus_ten_log_mse():
    a, b = noise(0), noise(1)
    mse = torch.nn.functional.mse_loss(torch.tensor(a).double() / 255, torch.tensor(b).double() / 255).item()
    assert recon.psnr(a, b) == pytest.approx(-10 * math.log10(mse), abs=1e-9)
    assert recon.psnr(a, b) == recon.psnr(b, a)  # and no uint8 wraps around
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert recon.psnr(black, white) == 0
    assert recon.psnr(black, np.full_like(black, 51)) == pytest.approx(20 * math.log10(5))  # an error of 1/5


def test_psnr_of_equal_and_nearly_equal_pictures_is_bounded():
    a = noise(0, 64, 64)
    almost = a.copy()
    almost[0, 0, 0] ^= 1
    assert recon.psnr(a, a) == recon.psnr(a, almost) == 50  # they would be infinite and 89 dB


def test_recon_and_psnr_read_their_roles():
    samples = {"image": [noise(0), noise(1)], "source": [noise(2), noise(1)], "recon": [noise(2), noise(3)]}
    psnr, cycle = recon.load(), recon.load_recon()
    assert (psnr.needs, cycle.needs) == (("image", "source"), ("recon", "source"))
    assert psnr.strict is None and cycle.strict is None
    a, b = psnr(samples, [""] * 2, [{}] * 2), cycle(samples, [""] * 2, [{}] * 2)
    assert a.dtype == torch.float32 and a.tolist() == [pytest.approx(recon.psnr(noise(0), noise(2))), 50]
    assert b.tolist() == [50, pytest.approx(recon.psnr(noise(3), noise(1)))]


def test_psnr_of_each_item_is_its_own():
    score = recon.load()
    images, sources = [noise(i, 5 + i, 9) for i in range(6)], [noise(9 + i, 5 + i, 9) for i in range(6)]
    got = score({"image": images, "source": sources}, [""] * 6, [{}] * 6)
    single = [score({"image": [a], "source": [b]}, [""], [{}]) for a, b in zip(images, sources)]
    torch.testing.assert_close(got, torch.cat(single), atol=0, rtol=0)
    back = score({"image": images[::-1], "source": sources[::-1]}, [""] * 6, [{}] * 6)
    torch.testing.assert_close(back, got.flip(0), atol=0, rtol=0)

    pictures = [Image.fromarray(a) for a in images]
    files = [io.BytesIO() for _ in images]
    for picture, file in zip(pictures, files):
        picture.save(file, format="PNG")
    decoded = [np.array(Image.open(file)) for file in files]
    for other in (pictures, decoded):
        torch.testing.assert_close(score({"image": other, "source": sources}, [""] * 6, [{}] * 6), got, atol=0, rtol=0)


def test_psnr_of_a_missing_picture_is_nan_and_of_another_size_an_error():
    score = recon.load_recon()
    got = score({"recon": [noise(0), None], "source": [noise(0), noise(0)]}, [""] * 2, [{}] * 2)
    assert got[0] == 50 and got[1].isnan()
    assert score({"recon": [], "source": []}, [], []).shape == (0,)
    with pytest.raises(ValueError, match=r"recon, item 1: .*one size.*\(9, 13, 3\).*\(9, 12, 3\)"):
        score({"recon": [noise(0)] * 2, "source": [noise(0), noise(0, 9, 12)]}, [""] * 2, [{}] * 2)
    with pytest.raises(ValueError, match="uint8"):
        score({"recon": [noise(0) / 255], "source": [noise(0)]}, [""], [{}])
    with pytest.raises(ValueError, match="1 pictures in 'recon', 2 in 'source'"):
        score({"recon": [noise(0)], "source": [noise(0)] * 2}, [""], [{}])


# ---------------------------------------------------------------------------------------------------------------------
# format, think_format


@pytest.mark.parametrize(
    "text, plain, think",
    [
        ("<answer>a red cat</answer>", 1, 0),
        ("<answer>a red\ncat</answer>", 1, 0),  # line breaks inside, which the recipes of old refused
        ("\nSure: <answer>cat</answer> Enjoy!", 1, 0),
        ("<think>hm\nhm</think>\n<answer>cat</answer>", 1, 1),
        ("hm, opened by the template</think><answer>cat</answer>", 1, 1),
        ("<think>hm</think> <answer>cat</answer> <|im_end|>\n<|endoftext|>", 1, 1),
        ("<think>I use <answer> and </answer></think><answer>cat</answer>", 1, 1),  # talks about the tags
        ("<think>hm</think> So: <answer>cat</answer>", 1, 0),
        ("<think>hm</think><answer>cat</answer> done", 1, 0),
        ("<think> \n</think><answer>cat</answer>", 1, 0),  # no thoughts
        ("</think><answer>cat</answer>", 1, 0),
        ("<think>a<think>b</think><answer>cat</answer>", 1, 0),
        ("<think>a</think>b</think><answer>cat</answer>", 1, 0),
        ("Well. <think>hm</think><answer>cat</answer>", 1, 0),
        ("<think>hm</think><answer> \n </answer>", 0, 0),
        ("<think>hm</think><answer>a</answer><answer>b</answer>", 0, 0),
        ("<think>hm</think><answer>a<answer>b</answer></answer>", 0, 0),
        ("<think>hm</think><answer>cat", 0, 0),
        ("<think>hm</think></answer>cat<answer>", 0, 0),
        ("<think>hm <answer>cat</answer>", 0, 0),  # cut off while it thought
        ("<answer>cat</answer><think>hm</think>", 0, 0),
        ("<Answer>cat</Answer>", 0, 0),
        ("<think>hm</think>", 0, 0),
        ("cat", 0, 0),
        ("", 0, 0),
    ],
)
def test_format_judges_tags(text, plain, think):
    assert (tags.has_answer(text), tags.has_thoughts_and_answer(text)) == (plain, think)


def test_answer_is_the_last_one_of_the_reply():
    assert tags.answer("<answer>a</answer> no: <answer> b\nc </answer> x") == "b\nc"
    assert tags.answer("<think><answer>a</answer></think> b") is None
    assert tags.answer("<answer>a<answer>b</answer>") == "b"
    assert tags.answer("<answer></answer>") == ""
    assert tags.answer("a</answer>") is None and tags.answer("<answer>a") is None


@pytest.mark.parametrize("load", [tags.load, tags.load_think])
def test_format_scores_texts(load):
    score = load()
    texts = ["<think>hm</think><answer>cat</answer>", "cat", None, 3, ""]
    got = score({"text": texts}, [""] * 5, [{}] * 5)
    assert score.needs == ("text",) and score.strict is None and got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([1, 0, math.nan, math.nan, 0]), equal_nan=True)
    assert score({"text": []}, [], []).shape == (0,)


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<think>", "</think>", "a", " ", "7", "\\boxed{", "{", "#"])
def test_long_replies_take_linear_time(piece):
    text = piece * 100_000  # a backtracking pattern would need minutes
    start = time.process_time()
    tags.has_answer(text), tags.has_thoughts_and_answer(text), maths.judge(text, 7), maths.judge(text, "x")
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------------------------------------------
# math: what is decided without math-verify


@pytest.mark.parametrize(
    "text, gold, right",
    [
        ("19", 19, 1),
        ("12+7=19", 19, 1),
        ("12 + 7 = 19.", 19, 1),
        ("It is **19**!", 19, 1),
        (r"so \(19\)", 19, 1),
        ("19<|im_end|>", 19, 1),
        ("first 18 then 19", 19, 1),
        ("first 19 then 18", 19, 0),
        ("<answer>19</answer> not 20", 19, 1),
        ("<answer>\n19 apples</answer>", 19, 1),
        (r"\boxed{18} or \boxed{19}, see 4", 19, 1),
        (r"<answer>\boxed{19} of 20</answer>", 19, 1),
        ("working: 1\n#### 1,019\nbye 4", 1019, 1),
        ("#### $1,019", 1019, 1),
        ("-5", -5, 1),
        ("\u22125", -5, 1),
        ("+5", 5, 1),
        ("007", 7, 1),
        ("3-5", -5, 0),
        ("12+7", 19, 0),  # the question is not its answer
        ("12+7", 7, 0),
        ("19.00", 19, 1),
        ("19.01", 19, 0),
        ("19.", 19, 1),
        ("1/19", 19, 0),
        ("1,2,19", 19, 0),
        ("nineteen", 19, 0),
        ("x19", 19, 0),
        ("<think>19</think> 20", 19, 0),
        ("<think>it is 19", 19, 0),
        ("", 19, 0),
        ("9" * 5000, 19, 0),
        ("72", "72", 1),
        ("#### 72", "Half of it is 36 + 36 = 72.\n#### 72", 1),
        (r"\boxed{73}", r"so it is \boxed{72}", 0),
        (r"\boxed{\frac{1}{2}}", r"$\frac{1}{2}$", 1),
        (r"\boxed{ \frac {1}{2} }", r"\frac{1}{2}", 1),
        ("<answer>(A)</answer>", "(A)", 1),
        ("<answer></answer>", "x", 0),
        ("<think>x", "x", 0),
    ],
)
def test_math_decides_numbers_and_strings_itself(text, gold, right):
    assert maths.judge(text, gold) == right


def test_boxed_takes_the_last_balanced_braces():
    assert maths.boxed(r"\boxed{1} and \boxed{\frac{1}{2}} }") == r"\frac{1}{2}"
    assert maths.boxed(r"\boxed{\sqrt{2}") is None and maths.boxed("{1}") is None
    # as some solutions of MATH have it
    assert maths.boxed(r"Hence $x = \boxed 5$, as $4$ is too small.") == "5" and maths.boxed(r"\boxed 10.") == "10"
    assert (
        maths.boxed(r"so \fbox{$\frac{1}{3}$} it is") == r"$\frac{1}{3}$" and maths.boxed(r"\boxed{4} \fbox{2}") == "2"
    )
    assert maths.boxed(r"\boxed") is None and maths.boxed(r"\boxed ") is None and maths.boxed(r"\boxed5") is None
    assert maths.judge("5", r"It follows that $x = \boxed 5$.") == 1.0
    assert maths.integer("1,000,000") == 10**6 and maths.integer("1,0000") is None and maths.integer("1{,}000") == 1000


def test_module_names_hide_nothing_from_the_package():
    # Importing rewards/math.py sets rewards.math: `import math` in rewards/__init__.py would now be that module.
    with pytest.raises(ValueError, match="not a finite number"):
        rewards.parse(["jpeg:nan"])
    assert rewards.parse(["jpeg:2"]) == [("jpeg", "jpeg", 2.0)]


def test_math_of_numbers_starts_no_process(monkeypatch):
    monkeypatch.setattr(maths.Verifier, "start", None)
    score = maths.load(num_processes=1)
    got = score({"text": ["19", "20", None]}, [""] * 3, [{"answer": 19}] * 3)
    torch.testing.assert_close(got, torch.tensor([1.0, 0, math.nan]), equal_nan=True)
    assert score.needs == ("text",) and score.strict is score and got.dtype == torch.float32
    assert score({"text": []}, [], []).shape == (0,)


@pytest.mark.parametrize("metadata", [[{}], [{"answer": None}], [{"answer": ""}], [{"answer": True}], [None]])
def test_math_names_the_item_without_answer(metadata):
    with pytest.raises(ValueError, match="math, item 1: metadata 'answer': expected a number or a text"):
        maths.load()({"text": ["1", "1"]}, [""] * 2, [{"answer": 1}] + metadata)


def test_math_wants_metadata_for_every_text():
    with pytest.raises(ValueError, match="got none for 1"):
        maths.load()({"text": ["1"]}, [""], None)
    with pytest.raises(ValueError, match="got 2 for 1"):
        maths.load()({"text": ["1"]}, [""], [{"answer": 1}] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# math: what math-verify decides

VERDICTS = [
    ("0.5", "1/2", 1),
    ("$\\frac{2}{4}$", "1/2", 1),
    (r"\boxed{1.41421356}", r"\sqrt{2}", 1),
    (r"so \boxed{(x+1)^2}", "x^2+2x+1", 1),
    (r"\boxed{(x-1)^2}", "x^2+2x+1", 0),
    ("<answer>18.0</answer>", "18", 1),
    ("<answer>18 apples</answer>", "18", 1),
    (r"\boxed{18 \text{ cm}}", "18", 1),
    ("first 18 then 20", "20", 1),
    ("first 20 then 18", "20", 0),
    (r"\boxed{1, 2, 3}", "3", 0),  # many guesses are none
    ("<answer>1, 2, 3</answer>", "3", 0),
    ("<answer>1, 2</answer>", "1, 2", 1),
    ("<answer>2, 1</answer>", r"\{1, 2\}", 1),
    ("6*3.5\n=21.0", "42/2", 1),
    (r"\boxed{\$18.50}", "18.5", 1),
    (r"the answer is $\frac{3}{4}$.", "0.75", 1),
    (r"\frac{3}{4}", "0.75", 1),
    (r"<answer>x = \frac{3}{4}</answer>", "0.75", 1),
    ("1,000.50", "1000.5", 1),
    ("50%", "0.5", 1),
    (r"$20$ or maybe \boxed{18}", "20", 0),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
    ("#### 1,000.00", "1000", 1),
    ("-2.5 is it", -2.5, 1),
    ("no idea", "1/2", 0),
    (r"\boxed{\frac{1}{", "1/2", 0),
    ("<answer>B</answer>", "(A)", 0),
    ("<think>1/2</think> 0.25", "1/2", 0),
    (r"\boxed{)(}", "1/2", 0),
]


@pytest.fixture(scope="module")
def score():
    pytest.importorskip("math_verify", reason="pip install math-verify")
    return maths.load(num_processes=2)


def test_math_verifies_equivalence(score):
    texts, golds, right = zip(*VERDICTS)
    metadata = [{"answer": gold} for gold in golds]
    got = score({"text": texts}, [""] * len(texts), metadata)
    assert dict(zip(texts, got.tolist())) == dict(zip(texts, map(float, right)))
    back = score({"text": texts[::-1]}, [""] * len(texts), metadata[::-1])
    torch.testing.assert_close(back, got.flip(0), atol=0, rtol=0)
    single = [score({"text": [text]}, [""], [item]) for text, item in zip(texts, metadata)]
    torch.testing.assert_close(torch.cat(single), got, atol=0, rtol=0)


def test_math_works_outside_of_the_main_thread(score):
    got = []
    thread = threading.Thread(target=lambda: got.append(score({"text": ["0.5"]}, [""], [{"answer": "1/2"}])))
    thread.start()
    thread.join()
    assert got[0].tolist() == [1]


def test_math_that_takes_too_long_is_nan_and_its_neighbours_are_not():
    pytest.importorskip("math_verify", reason="pip install math-verify")
    score = maths.load(num_processes=1, time_limit=0.5)
    texts = ["0.5", r"\boxed{9^{9^{9^{9}}}}", "0.25", "0.5"]
    start = time.monotonic()
    got = score({"text": texts}, [""] * 4, [{"answer": "1/2"}] * 4)
    assert got.isnan().tolist() == [False, True, False, False] and got[[0, 2, 3]].tolist() == [1, 0, 1]
    assert time.monotonic() - start < 60  # one limit and two starts; without the limit it never ends


def test_math_process_that_dies_is_nan_once():
    pytest.importorskip("math_verify", reason="pip install math-verify")
    verifier = maths.Verifier()
    assert verifier("1/2", "0.5", 5) == 1
    verifier.process.send_signal(signal.SIGKILL)
    verifier.process.wait()
    assert math.isnan(verifier("1/2", "0.5", 5)) and verifier.process is None
    assert verifier("1/2", "0.5", 5) == 1


def test_math_processes_do_not_outlive_their_parent():
    pytest.importorskip("math_verify", reason="pip install math-verify")
    code = "from rewards.math import Verifier; v = Verifier(); print(v('1/2', '0.5', 5), v.process.pid)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    verdict, pid = run.stdout.split()
    assert verdict == "1.0" and run.stderr == ""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            os.kill(int(pid), 0)
        except (OSError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")


def test_math_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        maths.load(num_processes=1)({"text": ["0.5"]}, [""], [{"answer": "1/2"}])
