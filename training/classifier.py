"""Our own judge of generated frames: object, background colour, pattern and object centre."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .captions import COLOURS, MOTIONS, NAMES, PATTERNS
from .data import Batch


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


class Classifier(nn.Module):
    """A small convolutional net on frames [N, 3, E, E] in [-1, 1], reduced to E / 2 first."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(_stage(3, 32), _stage(32, 64), _stage(64, 128))
        self.late = _stage(128, 192)
        self.object = nn.Linear(192, len(NAMES))
        self.colour = nn.Linear(192, len(COLOURS))
        self.pattern = nn.Linear(192, len(PATTERNS))
        self.where = nn.Conv2d(128, 1, 3, padding=1)

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        early = self.early(F.avg_pool2d(frames, 2))
        late = self.late(early).mean((2, 3))
        h, w = early.shape[2:]
        weight = self.where(early).float().flatten(1).softmax(1).view(-1, h, w)
        x = (weight.sum(1) * ((torch.arange(w, device=frames.device) + 0.5) / w)).sum(1)
        y = (weight.sum(2) * ((torch.arange(h, device=frames.device) + 0.5) / h)).sum(1)
        return {
            "object": self.object(late).float(),
            "colour": self.colour(late).float(),
            "pattern": self.pattern(late).float(),
            "centre": torch.stack([x, y], 1),
        }


def classifier_loss(out: dict[str, Tensor], batch: Batch) -> Tensor:
    """Cross entropies and centre error; the batch holds pictures (one frame each)."""
    centre = torch.stack([batch.x[:, 0], batch.y[:, 0]], 1)
    loss = 10 * F.smooth_l1_loss(out["centre"], centre, beta=0.02)
    for name, target in (
        ("object", batch.obj),
        ("colour", batch.colour),
        ("pattern", batch.pattern),
    ):
        loss = loss + F.cross_entropy(out[name], target)
    return loss


def degrade(frames: Tensor, rng: random.Random) -> Tensor:
    """Noise, blur or a loss of resolution, as generated frames may show; [N, 3, E, E]."""
    kind = rng.randrange(4)
    if kind == 0:
        frames = F.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    elif kind == 1:
        edge = frames.shape[-1]
        small = F.interpolate(frames, scale_factor=rng.choice((0.5, 0.7)), mode="bilinear")
        frames = F.interpolate(small, size=edge, mode="bilinear")
    frames = frames * rng.uniform(0.9, 1.05) + rng.uniform(-0.04, 0.04)
    return frames + torch.randn_like(frames) * rng.choice((0.0, 0.02, 0.06))


@torch.no_grad()
def accuracy(out: dict[str, Tensor], batch: Batch) -> dict[str, float]:
    centre = torch.stack([batch.x[:, 0], batch.y[:, 0]], 1)
    return {
        "object": (out["object"].argmax(1) == batch.obj).float().mean().item(),
        "colour": (out["colour"].argmax(1) == batch.colour).float().mean().item(),
        "pattern": (out["pattern"].argmax(1) == batch.pattern).float().mean().item(),
        "centre_error": (out["centre"] - centre).abs().mean().item(),
    }


def displacement(centres: Tensor) -> Tensor:
    """Movement [B, 2] from the first to the last frames of predicted centres [B, T, 2]."""
    ends = max(1, centres.shape[1] // 8)
    return centres[:, -ends:].median(1).values - centres[:, :ends].median(1).values


def direction(moved: Tensor, still: float = 0.06) -> list[str]:
    """The motion word of each displacement [B, 2]; y points down."""
    words = []
    for dx, dy in moved.tolist():
        if max(abs(dx), abs(dy)) < still:
            words.append("not moving")
        elif abs(dx) >= abs(dy):
            words.append("moving right" if dx > 0 else "moving left")
        else:
            words.append("moving down" if dy > 0 else "moving up")
    return words


DIRECTIONS = [m for m in MOTIONS if m.startswith("moving")]
