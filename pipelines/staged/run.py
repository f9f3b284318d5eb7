"""Run: one pipeline call in stages, from its first schedule to its last step."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.clock import StepClock
from fastdiff.pipelines.families.base import Size, Staging
from fastdiff.pipelines.staged import schedule
from fastdiff.pipelines.staged.noise import clean_estimate, kind_of, level_at, level_of
from fastdiff.pipelines.staged.schedule import Span
from fastdiff.pipelines.staged.stages import Stage
from fastdiff.pipelines.staged.transition import match, renoise, resize, smaller_noise


@dataclass(frozen=True)
class Way:
    """How stages follow each other: the knobs of the method that do not belong to one stage."""

    transition: str
    resize: str
    noise: str


@dataclass
class Leg:
    """A stage of the running call: its schedule in a scheduler of its own, and its size."""

    stage: Stage
    span: Span
    scheduler: Any
    size: Size | None = None
    bound: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.scheduler.timesteps)


@dataclass
class Run:
    """The state of one call.

    models: denoisers by name. generator: the call's, which draws the new noise. sizes: (height,
    width) in pixels -> the sizes of all stages; raises where one is not possible. tell: called
    once, with the run, before the first step. own: the call's own schedule is left as it is.
    """

    pipe: Any
    models: dict[str, nn.Module]
    staging: Staging
    legs: list[Leg]
    way: Way
    generator: Any
    clock: StepClock
    sizes: Callable[[int, int], list[Size]]
    tell: Callable[["Run"], None]
    own: bool = False
    timesteps: Tensor | None = None
    sigmas: Tensor | None = None
    bar: Any = None
    _leg: int = 0
    _step: int = 0
    _tokens: float | None = None
    _first_noise: Tensor | None = None

    @property
    def leg(self) -> Leg:
        return self.legs[self._leg]

    @property
    def scheduler(self) -> Any:
        return self.leg.scheduler

    @property
    def model(self) -> nn.Module:
        return next(iter(self.models.values()))

    def prepare_latents(self, stock: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The pipeline's own function, for the size of the first stage."""
        bound = inspect.signature(stock).bind(*args, **kwargs)
        asked = bound.arguments
        for leg, size in zip(self.legs, self.sizes(asked["height"], asked["width"]), strict=True):
            leg.size = size
        first = self.legs[0]
        assert first.size is not None
        if first.stage.scale != 1:
            if asked.get("latents") is not None:
                raise ValueError("latents= are given at full size, and the first stage has scale="
                                 f"{first.stage.scale:g}: start with a stage of scale 1")
            asked["height"], asked["width"] = first.size.height, first.size.width
        made = stock(*bound.args, **bound.kwargs)
        latents = made[0] if isinstance(made, tuple) else made
        area = first.size.rows * first.size.columns
        unit = self.staging.unit(self.model)
        tokens = latents.shape[1] if latents.ndim == 3 else area / unit**2
        self._tokens = tokens / area
        return made

    def set_timesteps(self, args: tuple, kwargs: dict) -> None:
        """Write every stage's schedule and show the pipeline one after the other."""
        self._leg = self._step = 0
        for leg in self.legs:
            if self.own:
                leg.scheduler.set_timesteps(*args, **kwargs)
                continue
            bound = inspect.signature(leg.scheduler.set_timesteps).bind(*args, **kwargs)
            tokens = None
            if self._tokens is not None and leg.size is not None:
                tokens = round(self._tokens * leg.size.rows * leg.size.columns)
            schedule.write(leg.scheduler, leg.span, dict(bound.arguments), tokens)
        self.timesteps = torch.cat([leg.scheduler.timesteps for leg in self.legs])
        if hasattr(self.scheduler, "sigmas"):
            parts = [leg.scheduler.sigmas[:-1] for leg in self.legs]
            self.sigmas = torch.cat([*parts, self.legs[-1].scheduler.sigmas[-1:]])
        self.clock.begin(len(self.timesteps))

    def step(self, args: tuple, kwargs: dict) -> Any:
        """A step of the present stage; the last one of a stage leads over to the next."""
        if self._leg == self._step == 0:
            self.tell(self)
            self._describe()
        scheduler = self.scheduler
        bound = inspect.signature(scheduler.step).bind(*args, **kwargs)
        given = bound.arguments
        if self._step == 0 and self._leg > 0:
            # what a solver remembers of the stage before has another size and another schedule
            for memory in ("old_pred_original_sample", "timestep_back"):
                if memory in given:
                    given[memory] = None
        if self.way.noise == "correlated" and self._leg == self._step == 0:
            scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
            self._first_noise = self._unpack(given["sample"], self.leg).float() / scale
        crossing = self._step == self.leg.steps - 1 and self._leg < len(self.legs) - 1
        # read before the step, which moves the solver on
        level = level_at(scheduler, kind_of(scheduler), self._step) if crossing else None
        result = scheduler.step(*bound.args, **bound.kwargs)
        self.clock.advance()
        self._step += 1
        if level is None:
            return result
        stepped = result[0] if isinstance(result, tuple) else result.prev_sample
        crossed = self._cross(given["model_output"], given["sample"], stepped, level)
        if isinstance(result, tuple):
            return (crossed, *result[1:])
        result.prev_sample = crossed
        return result

    def rebind(self, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a denoiser's forward that belong to the size of the present stage."""
        leg = self.leg
        if self.staging.rebind is None or leg.size is None:
            return {}
        if all(other.stage.scale == 1 for other in (leg, self.legs[0])):
            return {}
        made = leg.bound.get(id(model))
        if made is None:
            made = leg.bound[id(model)] = self.staging.rebind(self.pipe, leg.size, arguments)
        # arguments that follow the step are made anew
        stale = made.get("timestep") is not None
        return self.staging.rebind(self.pipe, leg.size, arguments) if stale else made

    def watch_bar(self, bar: Any) -> Any:
        self.bar = bar
        self._describe()
        return bar

    def _cross(self, output: Tensor, sample: Tensor, stepped: Tensor, level: Any) -> Tensor:
        """The latent with which the next stage starts, packed as the pipeline holds it."""
        old, new = self.leg, self.legs[self._leg + 1]
        assert new.size is not None
        rows, columns = new.size.rows, new.size.columns
        if self.way.transition == "matched-noise":
            kind = kind_of(old.scheduler)
            latents = self._unpack(stepped, old)
            reached = level_of(kind, float(old.scheduler.sigmas[-1]))
            if latents.shape[-2:] == (rows, columns):
                crossed = latents
            else:
                fresh = self._draw((*latents.shape[:-2], rows, columns), latents.device)
                crossed, _ = match(latents, reached, fresh, kind)
        else:
            clean = clean_estimate(old.scheduler, level, output, sample)
            clean = resize(self._unpack(clean, old), rows, columns, self.way.resize)
            crossed = renoise(clean, self._noise(clean), schedule.first_level(new.scheduler))
        self._leg, self._step = self._leg + 1, 0
        for model in self.models.values():
            if getattr(model, "is_cache_enabled", False):
                model._reset_stateful_cache()  # type: ignore[operator]
        self._describe()
        return self.staging.pack(self.model, crossed, new.size).to(stepped.dtype)

    def _noise(self, like: Tensor) -> Tensor:
        if self._first_noise is None:
            return self._draw(like.shape, like.device)
        if self._first_noise.shape == like.shape:
            return self._first_noise
        return smaller_noise(self._first_noise, *like.shape[-2:])

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(shape, generator=self.generator, device=device, dtype=torch.float32)

    def _unpack(self, latents: Tensor, leg: Leg) -> Tensor:
        assert leg.size is not None
        return self.staging.unpack(self.model, latents, leg.size)

    def _describe(self) -> None:
        if self.bar is not None and len(self.legs) > 1:
            size = self.leg.size
            shown = "" if size is None else f", {size.height}x{size.width}"
            self.bar.set_description(f"stage {self._leg + 1}/{len(self.legs)}{shown}")
