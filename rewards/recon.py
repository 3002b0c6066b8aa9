"""PSNR between two pictures, in dB: how well one reproduces the other, pixel by pixel.

    PSNR = min(-10 log10(MSE), 50)      MSE over all pixels and channels, values in [0, 1]

recon  of "recon" against "source": an edit that was undone (cycle consistency) should give back the picture it began
       with. It says nothing about the edit itself: changing nothing scores best, so combine it with a reward that does.
psnr   of "image" against "source": how much of the source an edit left alone, or an autoencoder kept.

Without the bound equal pictures would be infinite, and their group's advantages NaN. 50 dB is an error of 0.8 / 255;
rounding to uint8 alone costs 59 dB. Common values are 10 (unrelated) to 40, ten times those of most other rewards:
weigh it accordingly.
"""

import math

import numpy as np
import torch

MAX_DB = 50.0


def psnr(image, other):
    """PSNR in dB, 0 .. 50, of two uint8 pictures [H, W, 3]."""
    mse = np.square(image.astype(np.int32) - other).mean() / 255**2
    return min(-10 * math.log10(mse), MAX_DB) if mse > 0 else MAX_DB


def load(device="cpu"):
    """The reward `psnr`: samples["image"] against samples["source"]. Runs on the CPU whatever `device` says."""
    return _compare("image", "source", "psnr")


def load_recon(device="cpu"):
    """The reward `recon`: samples["recon"] against samples["source"]. Runs on the CPU whatever `device` says."""
    return _compare("recon", "source", "recon")


def _compare(role, reference, name):
    def score(samples, prompts, metadata):
        images, others = samples[role], samples[reference]
        if len(images) != len(others):
            raise ValueError(f"{name}: {len(images)} pictures in {role!r}, {len(others)} in {reference!r}")
        reward_B = torch.full((len(images),), torch.nan)
        for k, pair in enumerate(zip(images, others)):
            if any(picture is None for picture in pair):
                continue
            a, b = map(np.asarray, pair)
            if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.ndim != 3:
                raise ValueError(
                    f"{name}, item {k}: expected two uint8 pictures of one size, "
                    f"got {role!r} {a.dtype} {a.shape}, {reference!r} {b.dtype} {b.shape}"
                )
            reward_B[k] = psnr(a, b)
        return reward_B

    score.needs, score.strict = (role, reference), None
    return score
