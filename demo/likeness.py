"""How near two results are: SSIM beside the command line's PSNR, and a map of the difference."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(one: Any, two: Any) -> float:
    """Structural similarity of float arrays [F, H, W, 3] in 0..1: mean over pixels and frames.

    Gaussian window of 11 pixels with sigma 1.5, without the border it cannot fill, as in Wang et
    al., "Image Quality Assessment", 2004. A side under 11 pixels takes the largest odd window.
    """
    window = min(WINDOW, *one.shape[1:3])
    taps = _taps(window - (window % 2 == 0))
    total = 0.0
    for a, b in zip(one, two, strict=True):
        total += float(_ssim_map(_planes(a), _planes(b), taps).mean())
    return total / len(one)


def _planes(frame: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame)).double().permute(2, 0, 1)[:, None]


def _taps(window: int) -> Tensor:
    x = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-x.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def _ssim_map(a: Tensor, b: Tensor, taps: Tensor) -> Tensor:
    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    return top / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))


def difference(one: Any, two: Any) -> tuple[Any, float]:
    """(a map, float [F, H, W, 3] in 0..1; the error it shows as full white).

    The largest channel's error of each pixel, from black over red and yellow to white. White is
    the 99.9th percentile, at least 4 of 255, so that small errors are seen and none is invented.
    """
    error = np.abs(one.astype("float32") - two.astype("float32")).max(axis=-1)
    top = max(float(np.quantile(error, 0.999)), 4 / 255)
    x = np.clip(error / top, 0, 1)[..., None] * 3
    return np.clip(x - np.array([0, 1, 2], dtype="float32"), 0, 1), top
