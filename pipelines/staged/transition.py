"""From one size to the next: resize a clean latent, add noise again, or match noise exactly.

Latents here are [..., rows, columns]; only the last two axes change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.pipelines.staged.noise import Level

RESIZES = ("bicubic", "bilinear", "area", "nearest")


def resize(latents: Tensor, rows: int, columns: int, how: str) -> Tensor:
    """A clean latent at another size; smaller ones are made without aliasing. float32 inside."""
    if latents.shape[-2:] == (rows, columns):
        return latents
    planes = latents.float().flatten(0, -3).unsqueeze(0)
    if how in ("bicubic", "bilinear"):
        smooth = F.interpolate(planes, (rows, columns), mode=how, antialias=True)
    else:
        mode = "nearest-exact" if how == "nearest" else how
        smooth = F.interpolate(planes, (rows, columns), mode=mode)
    return smooth.view(*latents.shape[:-2], rows, columns)


def renoise(clean: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Put a clean latent back to `level` with unit noise of its shape."""
    return level.signal * clean + level.noise * noise


def smaller_noise(noise: Tensor, rows: int, columns: int) -> Tensor:
    """Unit noise of a smaller size that looks like `noise`: sums over the cells it covers.

    Exactly white where the size is divided by a whole number; else neighbours share a border cell.
    """
    if rows > noise.shape[-2] or columns > noise.shape[-1]:
        raise ValueError("noise is carried from a larger size to a smaller one only")
    down = _cover(noise.shape[-2], rows).to(noise.device)
    across = _cover(noise.shape[-1], columns).to(noise.device)
    return down @ noise.float() @ across.T


def _cover(large: int, small: int) -> Tensor:
    """[small, large]: how much each large cell lies in each small one, rows of unit length."""
    edges = torch.arange(small + 1, dtype=torch.float64) * large / small
    cells = torch.arange(large, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    weights = overlap.clamp_min(0)
    return (weights / weights.norm(dim=1, keepdim=True)).float()


def match(latents: Tensor, level: Level, fresh: Tensor, kind: str) -> tuple[Tensor, Level]:
    """Change the size of a noisy latent and keep its noise white, exactly.

    fresh: unit noise of the new size, whose sides are the old ones times or over a whole number.
    Smaller: means over squares; their noise is white and weaker. Larger: repeated cells carry
    noise that is equal inside each square of k x k, so noise without the squares' means is added,
    k times as strong, and the sum is white (NT matching of the RALU paper with its least noise).
    Noise to signal so grows and shrinks with the side. Returns the latent and its level, written
    the way of `kind`.
    """
    rows, columns = fresh.shape[-2:]
    z = latents.float()
    if rows < z.shape[-2]:
        k = z.shape[-2] // rows
        changed, noise = _square_means(z, k), level.noise / k
    else:
        k = rows // z.shape[-2]
        spread = fresh.float() - _repeat(_square_means(fresh.float(), k), k)
        changed, noise = _repeat(z, k) + level.noise * k * spread, level.noise * k
    # flow matching keeps the sum at one, variance-preserving the length, Euler's way the signal
    total = {"flow": level.signal + noise, "preserving": (level.signal**2 + noise**2) ** 0.5}
    scale = 1 / total.get(kind, 1.0)
    return changed * scale, Level(level.signal * scale, noise * scale)


def _square_means(x: Tensor, k: int) -> Tensor:
    rows, columns = x.shape[-2] // k, x.shape[-1] // k
    return x.unflatten(-1, (columns, k)).unflatten(-3, (rows, k)).mean((-3, -1))


def _repeat(x: Tensor, k: int) -> Tensor:
    return x.repeat_interleave(k, -2).repeat_interleave(k, -1)
