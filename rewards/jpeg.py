"""JPEG compressibility and incompressibility, from DDPO (https://arxiv.org/abs/2305.13301, section 5.1).

    kB                  = bytes of the JPEG file / 1000       (quality 95, chroma 4:2:0: PIL's default)
    jpeg                = -kB / 500                           (compressibility, scaled as in the paper's code)
    jpeg_incompressibility = kB

No weights, so it suits a first test of a loop; what it teaches is flat colour, or noise. The size grows with the
resolution, and moves by about 0.1 % between versions of Pillow / libjpeg-turbo: compare runs of one resolution.
"""

import io

import torch
from PIL import Image


def kilobytes(image):
    """Size in kB (1000 bytes) of the uint8 picture [H, W, 3] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=95)
    return file.tell() / 1000


def load(device="cpu"):
    """Compressibility: -kB / 500, higher is smaller. Runs on the CPU whatever `device` says."""

    def score(samples, prompts, metadata):
        return torch.tensor([-kilobytes(image) / 500 for image in samples["image"]], dtype=torch.float32)

    score.needs, score.strict = ("image",), None
    return score


def load_incompressibility(device="cpu"):
    """Incompressibility: kB, higher is larger. Runs on the CPU whatever `device` says."""

    def score(samples, prompts, metadata):
        return torch.tensor([kilobytes(image) for image in samples["image"]], dtype=torch.float32)

    score.needs, score.strict = ("image",), None
    return score
