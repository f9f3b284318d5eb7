"""Run: one pipeline call in stages, from its first schedule to its last step."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.clock import StepClock
from fastdiff.pipelines.families.base import Condition, Size, Staging
from fastdiff.pipelines.staged import schedule
from fastdiff.pipelines.staged.conditions import once_a_size
from fastdiff.pipelines.staged.noise import clean_estimate, kind_of, level_at, level_of
from fastdiff.pipelines.staged.per_stage import at, hold
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
    condition: how this pipeline makes one, None where it has none. shape: height and width as the
    call names them, None where it leaves them out.
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
    condition: Condition | None = None
    shape: tuple[int, int] | None = None
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

    @property
    def looping(self) -> bool:
        return self.bar is not None

    @property
    def index(self) -> int:
        return self._leg

    @property
    def last(self) -> int:
        return len(self.legs) - 1

    def twin(self, index: int) -> int:
        """The last stage of the same size."""
        size = self.legs[index].size
        return max(i for i in range(len(self.legs)) if i == index or self.legs[i].size == size)

    def may_stop(self) -> bool:
        """Whether the latents have the size with which the call ends."""
        return self.twin(self._leg) == self.last

    def prepare(self, name: str, stock: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """One of the pipeline's functions that encode its condition, for every size."""
        if name == "prepare_latents":
            return self.prepare_latents(stock, args, kwargs)
        bound = inspect.signature(stock).bind(*args, **kwargs)
        return hold(self, once_a_size(self, self._sizes(), self.last, stock, bound))

    def prepare_latents(self, stock: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The pipeline's own function, for the size of the first stage."""
        bound = inspect.signature(stock).bind(*args, **kwargs)
        asked = bound.arguments
        self._size_legs(asked["height"], asked["width"])
        first = self.legs[0]
        assert first.size is not None
        if first.stage.scale != 1 and asked.get("latents") is not None:
            raise ValueError("latents= are given at full size, and the first stage has scale="
                             f"{first.stage.scale:g}: start with a stage of scale 1")
        made = self._made_first(stock, bound)
        latents = made[0] if isinstance(made, tuple) else made
        area = first.size.rows * first.size.columns
        unit = self.staging.unit(self.model)
        tokens = latents.shape[1] if latents.ndim == 3 else area / unit**2
        self._tokens = tokens / area
        return made

    def _made_first(self, stock: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """What the pipeline's function makes for the first stage, its condition for all stages."""
        if self.condition is not None and "prepare_latents" in self.condition.remade:
            made = once_a_size(self, self._sizes(), 0, stock, bound)
            return made[self.twin(0)][0], *hold(self, made)[1:]
        size = self._sizes()[0]
        bound.arguments.update(at(dict(bound.arguments), 0))
        if self.legs[0].stage.scale != 1:
            bound.arguments.update(height=size.height, width=size.width)
        return stock(*bound.args, **bound.kwargs)

    def _size_legs(self, height: int, width: int) -> None:
        for leg, size in zip(self.legs, self.sizes(height, width), strict=True):
            leg.size = size

    def _sizes(self) -> list[Size]:
        return [leg.size for leg in self.legs if leg.size is not None]

    def set_timesteps(self, args: tuple, kwargs: dict) -> None:
        """Write every stage's schedule and show the pipeline one after the other."""
        self._leg = self._step = 0
        for leg in self.legs:
            if self.own:
                leg.scheduler.set_timesteps(*args, **kwargs)
                continue
            bound = inspect.signature(leg.scheduler.set_timesteps).bind(*args, **kwargs)
            asked = dict(bound.arguments)
            if self._tokens is None and self.shape is not None and asked.get("mu") is not None:
                # this pipeline sets its schedule, for the full size, before it makes its latents
                self._size_legs(*self.shape)
                size = self._sizes()[-1]
                whole = schedule.tokens_of(leg.scheduler, asked["mu"])
                self._tokens = whole / (size.rows * size.columns)
            tokens = None
            if self._tokens is not None and leg.size is not None:
                tokens = round(self._tokens * leg.size.rows * leg.size.columns)
            schedule.write(leg.scheduler, leg.span, asked, tokens)
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
        stopping = getattr(self.pipe, "_interrupt", False) and not self.may_stop()
        # read before the step, which moves the solver on
        level = (level_at(scheduler, kind_of(scheduler), self._step) if crossing or stopping
                 else None)
        result = scheduler.step(*bound.args, **bound.kwargs)
        self.clock.advance()
        self._step += 1
        if level is None:
            return result
        stepped = result[0] if isinstance(result, tuple) else result.prev_sample
        lead = self._cut_short if stopping else self._cross
        crossed = lead(given["model_output"], given["sample"], stepped, level)
        if isinstance(result, tuple):
            return (crossed, *result[1:])
        result.prev_sample = crossed
        return result

    def rebind(self, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a denoiser's forward that belong to the size of the present stage."""
        leg = self.leg
        held = self.present(arguments)
        if self.staging.rebind is None or leg.size is None:
            return held
        if all(other.stage.scale == 1 for other in (leg, self.legs[0])):
            return held
        return held | self._rebound(leg, leg.size, model, {**arguments, **held})

    def present(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those arguments of a forward that hold a condition, in the present stage's size."""
        if self.condition is None:
            return {}
        found = at(arguments, self._leg)
        return {name: value for name, value in found.items() if value is not arguments[name]}

    def _rebound(
        self, leg: Leg, size: Size, model: nn.Module, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        assert self.staging.rebind is not None
        made = leg.bound.get(id(model))
        if made is None:
            made = leg.bound[id(model)] = self.staging.rebind(self.pipe, size, arguments)
        # arguments that follow the step are made anew
        stale = made.get("timestep") is not None
        return self.staging.rebind(self.pipe, size, arguments) if stale else made

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

    def _cut_short(self, output: Tensor, sample: Tensor, stepped: Tensor, level: Any) -> Tensor:
        """The clean estimate in the size with which the call ends, for a call that is stopped."""
        old, last = self.leg, self.legs[-1]
        assert last.size is not None
        clean = self._unpack(clean_estimate(old.scheduler, level, output, sample), old)
        clean = resize(clean, last.size.rows, last.size.columns, self.way.resize)
        self._leg = self.last
        return self.staging.pack(self.model, clean, last.size).to(stepped.dtype)

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
