"""AdamW as nearly every stage uses it: clipped gradients, a rate that warms up and falls."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def cosine(progress: float, steps: int, warm: int = 100) -> float:
    return min(1.0, (steps + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Descent:
    """most: the largest norm of all gradients. warm: steps to the full rate. steps: taken."""

    def __init__(
        self, params: Iterable[nn.Parameter], rate: float, betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.01, most: float = 1.0, warm: int = 100, fused: bool | None = None,
    ):
        self.params = list(params)
        self.rate, self.most, self.warm, self.steps = rate, most, warm, 0
        self.optimizer = torch.optim.AdamW(
            self.params, rate, betas=betas, weight_decay=decay, fused=fused)

    @classmethod
    def of_codec(cls, params: Iterable[nn.Parameter], rate: float, warm: int) -> "Descent":
        """As autoencoders are trained here."""
        params = list(params)
        return cls(params, rate, (0.9, 0.99), 0.0, 0.5, warm, fused=params[0].is_cuda)

    def step(self, loss: Tensor, progress: float) -> None:
        """One step down `loss`. progress: of the stage, 0 to 1."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.most)
        self.optimizer.param_groups[0]["lr"] = self.rate * cosine(progress, self.steps, self.warm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
