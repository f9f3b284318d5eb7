"""Calibration: what `fastdiff calibrate` found, and the model and run that it was found for."""

import dataclasses
import json
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from fastdiff.clock import StepClock
from fastdiff.method import Host

AGAIN = "run `fastdiff calibrate` for this model and size"


@dataclass(frozen=True)
class Calibration:
    """Settings by range of steps and layer, bound to what they were found for.

    model: class and config of each denoiser, by component name. scheduler: its class and config.
    steps: of the run that was calibrated. layers: heads and grid of each layer in order of first
    use, as [heads, frames, height, width]; None for a layer that never ran sparse.
    begins: first step of each range. density: by range and layer a number, or one for each head.
    modes: by range and layer a letter for each head. stripes: by layer and head, kept key blocks
    as the bits of a hexadecimal number. found: figures of the search, for the reader.
    """

    model: dict[str, Any]
    scheduler: dict[str, Any] | None
    steps: int
    layers: list[Any]
    begins: list[int]
    density: list[Any] | None = None
    modes: list[Any] | None = None
    stripes: dict[str, dict[str, str]] | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Any) -> "Calibration | None":
        """From plain data; a ValueError where it is none."""
        if given is None or isinstance(given, cls):
            return given
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(given, dict) or not {"model", "steps", "layers", "begins"} <= {*given}:
            raise ValueError("calibration is not what `fastdiff calibrate` writes: it needs "
                             "model, scheduler, steps, layers and begins")
        made = cls(**{"scheduler": None, **{k: v for k, v in given.items() if k in known}})
        for name in ("density", "modes"):
            table = getattr(made, name)
            shape = (len(made.begins), len(made.layers))
            if table is not None and any((len(table), len(row)) != shape for row in table):
                raise ValueError(f"the calibration's {name} table must have {shape[0]} ranges of "
                                 f"{shape[1]} layers")
        return made

    def __repr__(self) -> str:
        return f"Calibration({self.title()})"

    def title(self) -> str:
        """What it was found for, in a few words."""
        names = " + ".join(part["class"] for part in self.model.values())
        grids = dict.fromkeys("x".join(map(str, layer[1:])) for layer in self.layers if layer)
        return f"{names}, {' and '.join(grids)} tokens, {self.steps} steps"

    def check(self, host: Host) -> None:
        """Refuse another model or scheduler, naming the difference."""
        for name, part in host.models.items():
            wanted = self.model.get(name)
            if wanted is None and len(self.model) == len(host.models) == 1:
                wanted = next(iter(self.model.values()))
            if wanted is None:
                raise ValueError(f"the plan knows no part {name!r}, only "
                                 f"{', '.join(self.model)}: {AGAIN}")
            _refuse(name, wanted, described(part.model))
        scheduler = getattr(host.pipe, "scheduler", None)
        if scheduler is not None and self.scheduler is not None:
            _refuse("scheduler", self.scheduler, described(scheduler))

    def steps_told(self, steps: int) -> str | None:
        """How a run of `steps` steps reads this table; None where they are the same."""
        if steps in (0, self.steps):
            return None
        return f"found for {self.steps} steps, read at the same part of the way for {steps}"

    def layer(self, index: int, heads: int | None, grid: tuple[int, int, int]) -> None:
        """Refuse a layer of another shape than the one that was calibrated."""
        known = self.layers[index] if index < len(self.layers) else None
        if known is None:
            raise ValueError(f"the plan has no entry for layer {index}, which ran dense or not at "
                             f"all when it was made: {AGAIN}")
        if tuple(known[1:]) != tuple(grid):
            raise ValueError(f"the plan is for a grid of {_times(known[1:])} latent tokens, and "
                             f"this run has {_times(grid)}: {AGAIN}")
        if heads is not None and known[0] != heads:
            raise ValueError(f"the plan is for {known[0]} heads in layer {index}, and this model "
                             f"has {heads}: {AGAIN}")

    def range_of(self, clock: StepClock) -> int:
        """The range of the running step; the middle of the run where no scheduler counts."""
        step = self.steps // 2
        if clock.step is not None:
            # the same part of the way, where the run has another number of steps
            step = int((clock.step + 0.5) * self.steps / max(1, clock.steps))
        return max(0, bisect_right(self.begins, min(step, self.steps - 1)) - 1)

    def heads(self, index: int, clock: StepClock) -> list[float] | float:
        """Density of this layer now: one number, or one for each head."""
        assert self.density is not None
        return self.density[self.range_of(clock)][index]


def described(part: Any) -> dict[str, Any]:
    """Class and configuration of a model or scheduler as plain data."""
    config = {k: v for k, v in dict(part.config).items() if not k.startswith("_")}
    # the class that a clock has swapped in keeps the name of the original
    return {"class": type(part).__name__, "config": json.loads(json.dumps(config, default=str))}


def _refuse(name: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    if wanted["class"] != found["class"]:
        raise ValueError(f"the plan is for {name} of class {wanted['class']}, and this one is "
                         f"{found['class']}: {AGAIN}")
    # keys that only one diffusers version knows say nothing
    both = [key for key in wanted["config"] if key in found["config"]]
    unlike = [key for key in both if wanted["config"][key] != found["config"][key]]
    if unlike:
        told = "; ".join(f"{key} is {found['config'][key]!r}, in the plan {wanted['config'][key]!r}"
                         for key in unlike)
        raise ValueError(f"the plan is for another {name}: {told}. {AGAIN[0].upper()}{AGAIN[1:]}")


def _times(grid: Any) -> str:
    return " x ".join(str(n) for n in grid)
