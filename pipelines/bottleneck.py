"""Bottleneck sampling: high, low and high resolution in turn inside any call of a pipeline."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from fastdiff.method import Host, Method, check
from fastdiff.pipelines.families.base import Size, Staging
from fastdiff.pipelines.staged.accept import (
    check_caches,
    check_changeable,
    check_no_schedule,
    check_scheduler,
    check_whole,
    condition_of,
    fitted,
    staging_of,
)
from fastdiff.pipelines.staged.call import MAY_STOP, arguments_changed, attributes, wrap_call
from fastdiff.pipelines.staged.conditions import SizeOf, pictures_held
from fastdiff.pipelines.staged.run import Leg, Run, Way
from fastdiff.pipelines.staged.schedule import first_level, own_copy
from fastdiff.pipelines.staged.stages import (
    PRESETS,
    TRANSITIONS,
    Preset,
    Stage,
    check_stages,
    read_stages,
    spans,
)
from fastdiff.pipelines.staged.stand_in import stand_in
from fastdiff.pipelines.staged.transition import RESIZES
from fastdiff.scheduler import CLOCK

__all__ = ["BottleneckSampling", "Stage"]

NOISES = ("fresh", "correlated")


@dataclass(frozen=True)
class BottleneckSampling(Method):
    """Run the middle of the schedule at a lower resolution (arXiv 2503.18940).

    Most steps run where they cost a fraction; the first steps at full size set the layout, the
    last ones make the detail. Nothing is trained. The result is another picture than stock's.

    preset: stages under a name: balanced, fast or video; None is balanced unless stages are given.
    stages: a list of Stage(scale, steps, sigma_start, shift), or words such as
        "1:8, 0.5:16:0.93, 1:12:0.85"; used exactly as they are.
    transition: what a stage ends with. restart steps to a clean latent, resizes it and adds noise
        up to sigma_start again; continue does so from the last step's clean estimate, straight to
        the next sigma_start; matched-noise resizes the noisy latent so that its noise stays white,
        for scales that are whole multiples. None takes the preset's, else continue: better than
        restart in most comparisons (docs/bottleneck.md).
    resize: bicubic, bilinear, area or nearest, for clean latents.
    noise: fresh is drawn from the call's generator; correlated is the call's first noise at the
        stage's size, which keeps a seed's picture nearer to stock.
    force: allow a stage smaller than the model was trained at.
    """

    name: ClassVar[str] = "bottleneck"
    summary: ClassVar[str] = "steps at high, low and high resolution in turn, for any budget"
    kind: ClassVar[str] = "sampling"

    preset: str | None = None
    stages: Sequence[Stage] | str | None = None
    transition: str | None = None
    resize: str = "bicubic"
    noise: str = "fresh"
    force: bool = False

    def __post_init__(self) -> None:
        if self.stages is not None and self.preset is not None:
            raise ValueError("give either stages or a preset, not both")
        if self.stages is not None:
            object.__setattr__(self, "stages", read_stages(self.stages))
        for knob, accepted in (("preset", PRESETS), ("transition", TRANSITIONS),
                               ("resize", RESIZES), ("noise", NOISES)):
            value = getattr(self, knob)
            fits = value in accepted or (value is None and knob in ("preset", "transition"))
            check(fits, knob, value, " or ".join(accepted))
        chosen = self.chosen
        check_stages(chosen.stages, chosen.transition)
        if self.noise == "correlated":
            check(chosen.stages[0].scale == 1, "noise", self.noise,
                  "fresh, where the first stage is smaller than the picture")
            check(chosen.transition != "matched-noise", "noise", self.noise,
                  "fresh with matched-noise, which keeps the noise that is there")

    @property
    def chosen(self) -> Preset:
        """The stages and their transition, as given or as the preset has them."""
        if self.stages is not None:
            return Preset(read_stages(self.stages), self.transition or "continue", low=())
        preset = PRESETS[self.preset or "balanced"]
        return Preset(preset.stages, self.transition or preset.transition, preset.low)

    def chosen_for(self, scheduler: Any) -> Preset:
        return self.chosen if self.stages is not None else fitted(self.chosen, scheduler)

    def attach(self, host: Host) -> Callable[[], None]:
        staging = staging_of(host)
        check_scheduler(host.pipe.scheduler, self.chosen_for(host.pipe.scheduler))
        check_changeable(host, staging, self.chosen)
        names = list(host.models)

        @contextmanager
        def around(pipe: Any, asked: dict[str, Any]) -> Iterator[None]:
            models = {name: getattr(pipe, name) for name in names
                      if getattr(pipe, name, None) is not None}
            start = _Start(self, host, staging, pipe, models)
            run = start.run(asked)
            with _entered(pipe, run, models, partial(start.size_of, run)):
                yield

        return wrap_call(host.pipe, around)


@contextmanager
def _entered(
    pipe: Any, run: Run, models: dict[str, nn.Module], size_of: SizeOf
) -> Iterator[None]:
    """For the time of one call: the stand-in scheduler, the sizes, the bar, the hooks."""
    scheduler = stand_in(run.scheduler, run)
    object.__setattr__(scheduler, CLOCK, run.clock)
    bar = pipe.progress_bar
    shown = {"scheduler": scheduler, MAY_STOP: run.may_stop,
             "progress_bar": lambda *a, **k: run.watch_bar(bar(*a, **k))}
    condition = run.condition
    remade = {"prepare_latents", *(condition.remade if condition else ())}
    shown |= {name: _prepared(run, name, getattr(pipe, name)) for name in remade}
    with ExitStack() as stack:
        stack.enter_context(attributes(pipe, **shown))
        if condition is not None:
            stack.enter_context(pictures_held(pipe, condition, run, size_of))
            for model in (getattr(pipe, name) for name in condition.models):
                stack.enter_context(arguments_changed(model, run.present))
        if condition is not None or (run.staging.rebind is not None and len(run.legs) > 1):
            for model in models.values():
                stack.enter_context(arguments_changed(model, partial(run.rebind, model)))
        yield


def _prepared(run: Run, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run.prepare(name, stock, args, kwargs)


@dataclass
class _Start:
    """What is decided when a call begins."""

    method: BottleneckSampling
    host: Host
    staging: Staging
    pipe: Any
    models: dict[str, nn.Module]

    @property
    def model(self) -> nn.Module:
        return next(part.model for part in self.host.models.values())

    def run(self, asked: dict[str, Any]) -> Run:
        scheduler = self.pipe.scheduler
        chosen = self.method.chosen_for(scheduler)
        check_scheduler(scheduler, chosen)
        stages = chosen.stages
        steps = asked["num_inference_steps"]
        asked_spans = spans(stages, chosen.transition, steps)
        own = (len(stages) == 1 and asked_spans[0].native and asked_spans[0].steps == steps)
        if not own:
            check_no_schedule(asked, "do stages")
            check_caches(self.models)
        condition = None if own else condition_of(self.staging, self.pipe)
        if condition is not None:
            condition.check(self.pipe, asked)
        if not own:
            asked["num_inference_steps"] = sum(span.steps for span in asked_spans)
        legs = [Leg(stage, span, own_copy(scheduler))
                for stage, span in zip(stages, asked_spans, strict=True)]
        self.asked_steps = steps
        models = {name: part.model for name, part in self.host.models.items()}
        way = Way(chosen.transition, self.method.resize, self.method.noise)
        return Run(self.pipe, models, self.staging, legs, way, asked.get("generator"),
                   self.host.clock, lambda h, w: self.sizes(legs, h, w), self.tell, own,
                   condition, _shape(asked))

    def size_of(self, run: Run, index: int, height: int, width: int) -> Size:
        """The size that a picture of the condition has in a stage."""
        leg = run.legs[index]
        assert run.condition is not None and leg.size is not None
        own = run.condition.own_size
        return self._size(leg.stage.scale, height, width) if own else leg.size

    def sizes(self, legs: list[Leg], height: int, width: int) -> list[Size]:
        """The sizes of all stages; a ValueError where one is not possible or not wise."""
        preset = self.method.chosen
        if preset.low and not self.method.force:
            self._raise_low(legs, preset.low, height, width)
        found = [self._size(leg.stage.scale, height, width) for leg in legs]
        for leg, size in zip(legs, found, strict=True):
            if leg.stage.scale != 1 and not self.method.force:
                self._check_trained(leg.stage.scale, size, height, width)
        if preset.transition == "matched-noise":
            check_whole(found)
        return found

    def _raise_low(
        self, legs: list[Leg], low: tuple[float, ...], height: int, width: int
    ) -> None:
        """Give a preset's low stages the first of its scales that the model was trained at."""
        for scale in low:
            size = self._size(scale, height, width)
            if self._trained() <= size.height * size.width:
                break
        for leg in legs:
            if leg.stage.scale != 1:
                leg.stage = Stage(scale, leg.stage.steps, leg.stage.sigma_start, leg.stage.shift)

    def _size(self, scale: float, height: int, width: int) -> Size:
        cell, unit = self.staging.cell(self.pipe), self.staging.unit(self.model)
        if scale != 1:
            step = cell * unit
            height, width = (max(1, round(scale * side / step)) * step for side in (height, width))
        whole = unit if self.staging.whole else 1
        return Size(height, width, *(side // (cell * whole) * whole for side in (height, width)))

    def _trained(self) -> int:
        return self.staging.trained(self.model) or 0

    def _check_trained(self, scale: float, size: Size, height: int, width: int) -> None:
        least = self._trained()
        if size.height * size.width >= least:
            return
        nearest = (least / (height * width)) ** 0.5
        advice = (f"use a scale of {nearest:.2f} or more" if nearest < 1
                  else "use a larger picture, or fewer steps instead of stages")
        raise ValueError(
            f"scale={scale:g} of {height}x{width} is {size.height}x{size.width}, smaller than "
            f"{type(self.model).__name__} was trained at ({least} pixels): {advice}; force=True "
            "does it anyway")

    def tell(self, run: Run) -> None:
        def say(what: str, value: str) -> None:
            self.host.report.tell(self.method.name, what, value)

        work = 0.0
        full = run.legs[-1].size
        for number, leg in enumerate(run.legs, 1):
            assert leg.size is not None and full is not None
            work += leg.steps * leg.size.rows * leg.size.columns / (full.rows * full.columns)
            shift = "own" if leg.span.shift is None else f"{leg.span.shift:g}"
            start = first_level(leg.scheduler).share
            say(f"stage {number}", f"{leg.size.height}x{leg.size.width}, {leg.steps} steps, noise "
                f"{start:.3f} to {leg.span.end:.3f}, shift {shift}")
        if len(run.legs) > 1:
            say("transition", f"{run.way.transition}, {run.way.resize}, {run.way.noise} noise")
        if self.staging.trained(self.model) is None:
            say("smallest trained size", "not known for these weights, so not checked")
        say("latent cells computed", f"{work / self.asked_steps:.2f} of a stock call of "
            f"{self.asked_steps} steps")


def _shape(asked: dict[str, Any]) -> tuple[int, int] | None:
    height, width = asked.get("height"), asked.get("width")
    return None if height is None or width is None else (height, width)
