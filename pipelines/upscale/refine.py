"""Refinement: the second stage inside the pipeline's own call, from encoded clip to last step."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.clock import StepClock
from fastdiff.pipelines.staged.noise import Level, kind_of, level_at
from fastdiff.pipelines.upscale import schedule


@dataclass
class Checkpoint:
    """What a run needs to go on: `done` steps are behind it."""

    done: int
    latents: Tensor
    scheduler: Any


@dataclass
class Refinement:
    """What stands behind the pipeline's scheduler during the second stage.

    scheduler: a stock copy of the user's. steps, kept: of the whole schedule, and how many are
    run. shift, grown: see schedule.write. clean: latents of the encoded clip as the pipeline holds
    its own, given those; not called when a checkpoint is gone on from. begun: told the first noise
    share before the first step. saved: given a checkpoint after each step. stopped: no noise is put
    on the clip, for a call that makes no step.
    """

    scheduler: Any
    steps: int
    kept: int
    shift: float | None
    grown: float
    clean: Callable[[Tensor], Tensor]
    clock: StepClock
    begun: Callable[[float], None]
    saved: Callable[[Checkpoint], None] = lambda checkpoint: None
    resumed: Checkpoint | None = None
    stopped: bool = False
    timesteps: Tensor | None = None
    sigmas: Tensor | None = None
    _latents: Tensor | None = None
    _noise: Tensor | None = None
    _done: int = 0

    def prepare_latents(self, stock: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The pipeline's own function; its noise becomes the noise on the clip."""
        made = stock(*args, **kwargs)
        latents = made[0] if isinstance(made, tuple) else made
        if self.resumed is not None:
            mixed = self.resumed.latents.to(latents.device, latents.dtype)
        else:
            # some pipelines scale their noise for the scheduler
            times = self._scaling(stock)
            self._noise = latents.float() / times
            mixed = self._latents = latents.clone()
            self._mix()
        return (mixed, *made[1:]) if isinstance(made, tuple) else mixed

    def set_timesteps(self, args: tuple, kwargs: dict) -> None:
        if self.resumed is not None:
            self._done = self.resumed.done
            self.scheduler = self.resumed.scheduler
            self.timesteps = self.scheduler.timesteps[self._done :]
            sigmas = getattr(self.scheduler, "sigmas", None)
            self.sigmas = None if sigmas is None else sigmas[self._done :]
        else:
            bound = inspect.signature(self.scheduler.set_timesteps).bind(*args, **kwargs)
            schedule.write(self.scheduler, dict(bound.arguments), self.steps, self.kept,
                           self.shift, self.grown)
            self.timesteps = self.scheduler.timesteps
            self.sigmas = getattr(self.scheduler, "sigmas", None)
        self.clock.begin(self.kept)
        self.clock.step = self._done
        self.begun(self.level.share)
        self._mix()

    @property
    def level(self) -> Level:
        """The noise with which the first kept step starts."""
        return level_at(self.scheduler, kind_of(self.scheduler), 0)

    def step(self, args: tuple, kwargs: dict) -> Any:
        result = self.scheduler.step(*args, **kwargs)
        self._done += 1
        self.clock.advance()
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        self.saved(Checkpoint(self._done, latents, self.scheduler))
        return result

    def _scaling(self, stock: Callable[..., Any]) -> float:
        names = getattr(getattr(stock, "__func__", stock), "__code__", None)
        scales = names is not None and "init_noise_sigma" in names.co_names
        return float(self.scheduler.init_noise_sigma) if scales else 1.0

    def _mix(self) -> None:
        """Put the noise on the clip, in place: some pipelines prepare latents before timesteps."""
        if self._latents is None or self._noise is None or self.timesteps is None:
            return
        signal, noise = Level(1.0, 0.0) if self.stopped else self.level
        clean = self.clean(self._latents).to(self._noise.device)
        self._latents.copy_(signal * clean + noise * self._noise)
        if self._latents.is_cuda:
            # what the encoder took is of sizes that the denoiser does not ask for
            torch.cuda.empty_cache()
        self._latents = self._noise = None
