"""Runs: the generations of a search, and how near one is to stock."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.api import disable, enable
from fastdiff.calibration.work import Work
from fastdiff.method import Method

# equal pictures have no finite PSNR
MOST_PSNR = 120.0


@dataclass
class Runs:
    """Generations of a pipeline over a few prompts, each with a seed of its own.

    call: arguments of the pipeline's call. work: where finished parts are kept. on_step: called
    after each step with what runs, the step and the number of steps.
    """

    pipe: Any
    prompts: list[str]
    call: dict[str, Any]
    work: Work
    seed: int = 0
    on_step: Callable[[str, int, int], None] = lambda what, step, steps: None  # noqa: E731

    def generate(self, number: int, method: Method | None, what: str, kind: str) -> Tensor:
        """Prompt `number` under `method` (None: stock); kind "latent" or "pt". float32, CPU."""
        disable(self.pipe)
        if method is not None:
            enable(self.pipe, method, strict=True)
        arguments = {**self.call, "prompt": self.prompts[number], "output_type": kind,
                     "generator": torch.Generator("cpu").manual_seed(self.seed + number)}

        def stepped(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            self.on_step(what, step + 1, getattr(pipe, "num_timesteps", 0))
            return tensors

        if "callback_on_step_end" in inspect.signature(type(self.pipe).__call__).parameters:
            arguments["callback_on_step_end"] = stepped
        try:
            found = self.pipe(**arguments)
        finally:
            disable(self.pipe)
        out = found.frames if hasattr(found, "frames") else found.images
        return torch.as_tensor(out).float().cpu()

    def stock(self, number: int, kind: str) -> Tensor:
        return self.work.part(f"stock-{kind}-{number}",
                              lambda: self.generate(number, None, "stock", kind))

    def psnr(self, method: Method, name: str) -> float:
        """Mean PSNR in dB to stock over the prompts, of decoded pictures or clips."""
        def one(number: int) -> float:
            fast = self.generate(number, method, name, "pt")
            error = float((fast - self.stock(number, "pt")).square().mean())
            return min(MOST_PSNR, -10 * torch.tensor(max(error, 1e-30)).log10().item())

        found = [self.work.part(f"psnr-{name}-{i}", lambda i=i: one(i))
                 for i in range(len(self.prompts))]
        return sum(found) / len(found)

    def error(self, method: Method, name: str, prompts: int | None = None) -> float:
        """Relative error (L2) of the last latents to stock, over the first so many prompts."""
        found = self._errors(method, name, prompts)
        return (sum(e for e, _ in found) / max(1e-30, sum(s for _, s in found))) ** 0.5

    def decibels(self, method: Method, name: str) -> list[float]:
        """Signal to error of the last latents, in dB, of each prompt."""
        found = self._errors(method, name, None)
        return [min(MOST_PSNR, 10 * math.log10(max(s, 1e-30) / max(e, 1e-30))) for e, s in found]

    def _errors(
        self, method: Method, name: str, prompts: int | None
    ) -> list[tuple[float, float]]:
        def one(number: int) -> tuple[float, float]:
            stock = self.stock(number, "latent")
            off = self.generate(number, method, name, "latent") - stock
            return float(off.square().sum()), float(stock.square().sum())

        numbers = range(min(prompts or len(self.prompts), len(self.prompts)))
        return [self.work.part(f"error-{name}-{i}", lambda i=i: one(i)) for i in numbers]
