"""How near clips and pictures are to stock's, and what a mean over them is worth."""

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

FEATURES = ("squared distance of unit-length feature maps, summed over the four stages of our own "
            "frame classifier (training/judge.py); stands in for LPIPS, whose weights are not here")
_FRAMES_AT_A_TIME = 64


def likeness(clips: Tensor, stock: Tensor) -> list[dict[str, float]]:
    """PSNR in dB, SSIM and feature distance of each clip; both [B, T, 3, H, W] in [0, 1]."""
    psnr, ssim = similarity(clips, stock)
    far = features(clips, stock)
    return [{"psnr": p, "ssim": s, "features": f}
            for p, s, f in zip(psnr, ssim, far, strict=True)]


def similarity(clips: Tensor, stock: Tensor) -> tuple[list[float], list[float]]:
    """PSNR in dB and SSIM of each clip to stock's, on the device where they are."""
    error = (clips - stock).square().flatten(1).mean(1).clamp_min(1e-12)
    psnr = (-10 * error.log10()).tolist()
    with _full_precision():
        return psnr, [_ssim(a, b) for a, b in zip(clips, stock, strict=True)]


def _full_precision() -> Any:
    """Convolutions on a GPU in float32: a variance is a small difference, lost in TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _ssim(one: Tensor, two: Tensor) -> float:
    """Mean structural similarity over frames; Gaussian window of 11, sigma 1.5."""
    place = torch.arange(11, device=one.device) - 5.0
    line = torch.exp(-place.square() / (2 * 1.5**2))
    line = line / line.sum()
    down, along = line.view(1, 1, 11, 1).expand(3, -1, -1, -1), line.view(1, 1, 1, 11)
    along = along.expand(3, -1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, down, groups=3), along, groups=3)

    a, b = one.float(), two.float()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(found.mean())


@torch.no_grad()
def features(clips: Tensor, stock: Tensor) -> list[float]:
    """Mean feature distance of each clip to stock's; see FEATURES. Zero is equal."""
    stages = _stages(str(clips.device))
    found = []
    for one, two in zip(clips, stock, strict=True):
        total = 0.0
        with _full_precision():
            for a, b in zip(one.split(_FRAMES_AT_A_TIME), two.split(_FRAMES_AT_A_TIME),
                            strict=True):
                x, y = (F.avg_pool2d(2 * side.float() - 1, 2) for side in (a, b))
                for stage in stages:
                    x, y = stage(x), stage(y)
                    gap = F.normalize(x, dim=1) - F.normalize(y, dim=1)
                    total += float(gap.square().sum(1).mean((1, 2)).sum())
        found.append(total / len(one))
    return found


@lru_cache(maxsize=2)
def _stages(device: str) -> list[Callable[[Tensor], Tensor]]:
    from training.judge import load_judge

    judge: Any = load_judge(device)
    return [*judge.early, judge.late]


def mean_ci(values: list[float]) -> dict[str, float | None]:
    """Mean with the half width of its 95 % confidence interval (None of a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(x.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": round(float(x.mean()), 5), "ci95": None if half is None else round(half, 5)}


def paired(
    clips: dict[Any, dict[str, float]], other: dict[Any, dict[str, float]], what: str
) -> dict[str, float | None] | None:
    """Mean difference to another method over the clips that both made; None without any."""
    both = [clip[what] - other[key][what] for key, clip in clips.items() if key in other]
    return mean_ci(both) if both else None
