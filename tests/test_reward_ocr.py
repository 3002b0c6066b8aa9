import io
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import ocr

WORDS = ["Bakery", "Open", "Coffee", "Sunset", "Library", "Garden", "Museum", "Kitchen", "Harbor", "Winter"]
SIZES = [18, 28, 44]  # of the letters, in pixels; the pictures are squares of 200


def picture(text, size=44, angle=0.0, ink="black", paper="white"):
    image = Image.new("RGB", (200, 200), paper)
    font = ImageFont.load_default(size)  # the one that Pillow brings along
    ImageDraw.Draw(image).multiline_text((100, 100), text, fill=ink, font=font, anchor="mm", spacing=12)
    return np.array(image.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=paper))


def sign(text):
    return f'A sign that says "{text}" in the rain'


# ---------------------------------------------------------------------------------------------------------------------
# the formula


@pytest.mark.parametrize(
    "target, read, reward",
    [
        ("HELLO", "hello world", 1),
        ("HELLO", "helo", 0.8),
        ("HELLO", "", 0),
        ("HELLO", "x" * 30, 0),
        ("Open 24 Hours", "OPEN24 HOUR", 1 - 1 / 11),
        ("Stop", "ST0P", 0.75),
        ("ab", "ba", 0),
    ],
)
def test_ocr_formula(target, read, reward):
    assert ocr.match(target, read) == pytest.approx(reward, abs=1e-12)


def test_levenshtein_equals_its_recursive_definition():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    r = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(r.choice(list("abc"), n)) for n in r.integers(0, 6, 2))
        assert ocr.levenshtein(a, b) == ocr.levenshtein(b, a) == slow(a, b), (a, b)
    assert ocr.levenshtein("kitten", "sitting") == 3


def test_target_is_the_first_text_in_double_quotes():
    assert ocr.quoted('a "Red Fox" and a "Blue"') == "Red Fox"
    assert ocr.quoted("it's \u201cOpen\u201d today") == "Open"
    assert ocr.quoted('it is 5 o\'clock "\n now"') == "\n now"
    for prompt in ("no text", 'one " quote', '""', '" "', None):
        with pytest.raises(ValueError, match="no text to draw, in double quotes"):
            ocr.quoted(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# the engine


@pytest.fixture(scope="module")
def score():
    pytest.importorskip("rapidocr", reason="pip install 'rapidocr>=3.10,<3.11' onnxruntime")
    return ocr.load(num_threads=1)


@pytest.mark.parametrize("angle", [0, 6])
def test_ocr_reads_words_of_three_sizes(score, angle):
    images = [picture(word, size, angle) for size in SIZES for word in WORDS]
    args = {"image": images}, [sign(word) for word in WORDS] * 3, [{}] * len(images)
    got, strict = score(*args).view(3, -1), score.strict(*args).view(3, -1)
    assert got.dtype == strict.dtype == torch.float32
    assert (got[2] == 1).all() and (strict[2] == 1).all()  # large
    assert got.mean() > 0.97 and strict.mean() > 0.9


def test_ocr_tells_wrong_text_and_no_text_from_the_right_one(score):
    blank, dots = np.full((200, 200, 3), 255, np.uint8), np.zeros((1, 1, 3), np.uint8)
    two = picture("Coffee\nShop", 36)
    images = [blank, dots, picture("Coffee"), two, two, picture("Winter"), None]
    targets = ["Coffee", "Coffee", "Coffey", "coffee shop", "COFFEE", "Sunny", "Coffee"]
    args = {"image": images}, [sign(target) for target in targets], [{}] * 7
    soft, strict = score(*args).tolist(), score.strict(*args).tolist()
    assert soft[:5] == pytest.approx([0, 0, 5 / 6, 1, 1]) and soft[5] < 0.5
    assert strict[:6] == [0, 0, 0, 1, 0, 0]  # surplus text is what only strict sees
    assert np.isnan(soft[6]) and np.isnan(strict[6])


def test_ocr_reads_colours_as_they_are(score, monkeypatch):
    seen = []
    engine = pytest.importorskip("rapidocr").RapidOCR
    preprocess = engine.preprocess_img

    def spy(self, image):
        seen.append(image[0, 0].tolist())
        return preprocess(self, image)

    monkeypatch.setattr(engine, "preprocess_img", spy)
    red = picture("Open", paper=(200, 10, 20), ink="white")
    assert score({"image": [red]}, [sign("Open")], [{}]) == 1
    assert seen == [[20, 10, 200]]  # BGR, as the models were trained


def test_ocr_of_each_picture_is_its_own(score):
    images = [picture(word, 30) for word in ("Open", "Museum", "Harbor", "Winter")]
    images[1] = images[1][40:160]  # another size
    prompts = [sign(word) for word in ("Open", "Museums", "Harvard", "Win")]
    got = score({"image": images}, prompts, [{}] * 4)
    fresh = ocr.load(num_threads=2)  # it has not seen them
    back = fresh({"image": images[::-1]}, prompts[::-1], [{}] * 4).flip(0)
    torch.testing.assert_close(back, got, atol=0, rtol=0)
    assert len(set(got.tolist())) > 2

    decoded = []
    for image in images:
        Image.fromarray(image).save(file := io.BytesIO(), format="PNG")
        decoded.append(Image.open(file))
    single = [score({"image": [image]}, [prompt], [{}]) for image, prompt in zip(decoded, prompts)]
    torch.testing.assert_close(torch.cat(single), got, atol=0, rtol=0)
    assert score({"image": []}, [], []).shape == (0,)


def test_ocr_strict_form_reads_no_picture_twice(score):
    args = {"image": [picture("Garden", 33)]}, [sign("Garden")], [{}]
    start = time.perf_counter()
    score(*args)
    between = time.perf_counter()
    score.strict(*args)
    assert time.perf_counter() - between < (between - start) / 5


def test_ocr_names_what_is_malformed(score):
    image = picture("Open")
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        score({"image": [image]}, [sign("a")] * 2, [{}])
    with pytest.raises(ValueError, match="'a sign' has no text to draw"):
        score({"image": [image]}, ["a sign"], [{}])
    with pytest.raises(ValueError, match=r"item 1: expected a uint8 picture .* float64 \(200, 200, 3\)"):
        score({"image": [image, image / 255]}, [sign("a")] * 2, [{}] * 2)


def test_ocr_without_its_models_says_what_to_install(monkeypatch):
    pytest.importorskip("rapidocr", reason="pip install 'rapidocr>=3.10,<3.11' onnxruntime")
    monkeypatch.setattr(ocr, "MODELS", ("PP-OCRv6_det_small.onnx", "gone.onnx"))
    with pytest.raises(RuntimeError, match="no gone.onnx in .*\npip install"):
        ocr.load()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RuntimeError, match="rapidocr.*\npip install"):
        ocr.load()
