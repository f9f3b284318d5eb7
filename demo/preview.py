"""A small picture of the latents while they are being denoised, without the decoder.

Latents are near to linear in colour, so a matrix fitted by least squares from latents to the
decoded picture shows what they hold, for any model, at no cost. Each finished run improves it.
"""

import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 256
MEMORY = 0.8


class Preview:
    """Learns the matrix of one model; draws JPEGs."""

    def __init__(self) -> None:
        self._matrix: Tensor | None = None
        self._products: tuple[Tensor, Tensor] | None = None
        self._before: tuple[float, Tensor] | None = None

    def begin(self) -> None:
        """A run starts."""
        self._before = None

    def clean(self, latents: Tensor, scheduler: Any, step: int) -> Tensor:
        """What the latents are going to be: the line through the last two steps, at sigma 0.

        Exact for one Euler step of a flow or of noise added to the picture; where a scheduler shows
        no falling sigmas, and in the first step, the latents as they are.
        """
        sigmas = getattr(scheduler, "sigmas", None)
        now = latents.detach().float().cpu()
        if sigmas is None or step + 1 >= len(sigmas):
            return now
        sigma, before = float(sigmas[step + 1]), self._before
        self._before = (sigma, now)
        if before is None or before[1].shape != now.shape or before[0] <= sigma:
            return now
        return now - sigma * (now - before[1]) / (sigma - before[0])

    def fit(self, latents: Tensor, frames: Any) -> None:
        """Learn from a finished run. latents: final ones; frames: float [F, H, W, 3] in 0..1."""
        grid = _grid(latents)
        if grid is None:
            return
        channels, count, height, width = grid.shape
        pixels = torch.from_numpy(frames).float().permute(0, 3, 1, 2)
        pick = torch.linspace(0, len(pixels) - 1, count).round().long()
        pixels = F.interpolate(pixels[pick], (height, width), mode="area")
        x = grid.permute(1, 2, 3, 0).reshape(-1, channels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        y = pixels.permute(0, 2, 3, 1).reshape(-1, 3)
        if self._products is None or len(self._products[0]) != channels + 1:
            # a little ridge: a plain picture leaves channels undetermined
            self._products = (1e-3 * torch.eye(channels + 1), torch.zeros(channels + 1, 3))
        # earlier results count less and less: one picture alone knows few colours
        self._products = (MEMORY * self._products[0] + x.T @ x / len(x),
                          MEMORY * self._products[1] + x.T @ y / len(x))
        self._matrix = torch.linalg.solve(*self._products)

    def picture(self, latents: Tensor) -> bytes | None:
        """The middle frame as a JPEG; None where the latents' form is not known."""
        grid = _grid(latents)
        if grid is None or self._matrix is None or len(grid) != len(self._matrix) - 1:
            return None
        frame = grid[:, grid.shape[1] // 2]
        colour = torch.einsum("chw,cd->dhw", frame, self._matrix[:-1])
        colour = (colour + self._matrix[-1][:, None, None]).clamp(0, 1)
        scale = SIDE / max(colour.shape[1:])
        if scale > 1:
            size = [round(side * scale) for side in colour.shape[1:]]
            colour = F.interpolate(colour[None], size, mode="bicubic")[0].clamp(0, 1)
        return _jpeg((colour * 255).round().byte().permute(1, 2, 0).numpy())


def _grid(latents: Tensor) -> Tensor | None:
    """Float [C, F, H, W] of the first sample; None for packed latents."""
    first = latents.detach().float().cpu()[0]
    if first.dim() == 3:
        return first[:, None]
    return first if first.dim() == 4 else None


def _jpeg(pixels: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=85)
    return file.getvalue()
