"""OCR: does a picture show the text that the prompt quotes? The reward of Flow-GRPO (https://arxiv.org/abs/2505.05470).

    reward = 1 - min(distance, n) / n     n letters in the quoted text

distance is Levenshtein's between the quoted text and all that was read, both in lower case without white space; 0 where
the quoted text is part of what was read. So text beside it costs nothing: `strict` wants the quoted text alone.

The engine is RapidOCR 3.10 on the CPU, with the PP-OCRv6 small models of its wheel: no download, 0.3 s for a picture of
1024 x 1024 with one line, on one core. Engines differ by several percent: compare numbers of one engine only, and those
that Flow-GRPO reports are of PP-OCRv4.
"""

import hashlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MODELS = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"  # 31 MB, in rapidocr/models
TARGET = re.compile('["\u201c\u201d]([^"\u201c\u201d]*[^"\u201c\u201d\\s][^"\u201c\u201d]*)["\u201c\u201d]')


def quoted(prompt):
    """The first text in double quotes, straight or curly, that is not blank. ValueError if there is none."""
    found = TARGET.search(prompt) if isinstance(prompt, str) else None
    if not found:
        raise ValueError(f"ocr: the prompt {prompt!r} has no text to draw, in double quotes")
    return found[1]


def letters(text):
    """`text` as it is compared: lower case, no white space."""
    return "".join(text.lower().split())


def levenshtein(a, b):
    """The least number of letters to insert, delete or replace that turns `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def match(target, read):
    """0 .. 1: the formula above."""
    target, read = letters(target), letters(read)
    if target in read:
        return 1.0
    return 1 - min(levenshtein(read, target), len(target)) / len(target)


def load(device="cpu", num_threads=None):
    """OCR reward of samples["image"] for the text that `prompts` quote; strict is 1 if that is all that was read.

    Reads on `num_threads` threads (default: 8, or the cores of this rank), on the CPU whatever `device` says. A picture
    that is None is NaN. ValueError for a prompt that quotes nothing. Raises RuntimeError if RapidOCR is not installed.
    """
    try:
        import rapidocr
    except ImportError as error:
        raise RuntimeError(f"ocr: {error}.\npip install 'rapidocr>=3.10,<3.11' onnxruntime") from None
    # Given by path: a model that it misses RapidOCR would download.
    folder = Path(rapidocr.__file__).parent / "models"
    for name in MODELS:
        if not (folder / name).is_file():
            raise RuntimeError(f"ocr: no {name} in {folder}.\npip install --force-reinstall 'rapidocr>=3.10,<3.11'")
    params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
    params |= {"Det.model_path": str(folder / MODELS[0]), "Rec.model_path": str(folder / MODELS[1])}
    if num_threads is None:
        num_threads = max(1, min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    pool, own, known = ThreadPoolExecutor(num_threads), threading.local(), {}

    def read(image):
        key = image.shape, hashlib.sha1(image.tobytes()).digest()
        text = known.get(key)  # an evaluation asks for the strict form of the pictures that it just scored
        if text is None:
            if not hasattr(own, "engine"):
                own.engine = rapidocr.RapidOCR(params=params)
            # A PIL picture: arrays are taken for BGR. Without the classifier, which turns upside-down text upright.
            text = " ".join(own.engine(Image.fromarray(image), use_cls=False).txts or ())
            if len(known) >= 4096:
                known.clear()
            known[key] = text
        return text

    def texts_and_targets(samples, prompts):
        images = samples["image"]
        if len(images) != len(prompts):
            raise ValueError(f"ocr: {len(images)} pictures for {len(prompts)} prompts")
        targets = [quoted(prompt) for prompt in prompts]
        images = [image if image is None else np.asarray(image) for image in images]
        for k, image in enumerate(images):
            if image is not None and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
                raise ValueError(f"ocr, item {k}: expected a uint8 picture [H, W, 3], got {image.dtype} {image.shape}")
        shown = iter(list(pool.map(read, [image for image in images if image is not None])))
        return [(None if image is None else next(shown), target) for image, target in zip(images, targets)]

    def score(samples, prompts, metadata):
        pairs = texts_and_targets(samples, prompts)
        rewards = [torch.nan if text is None else match(target, text) for text, target in pairs]
        return torch.tensor(rewards, dtype=torch.float32)

    def strict(samples, prompts, metadata):
        pairs = texts_and_targets(samples, prompts)
        exact = [torch.nan if text is None else float(letters(text) == letters(target)) for text, target in pairs]
        return torch.tensor(exact, dtype=torch.float32)

    score.needs, score.strict = ("image",), strict
    return score
