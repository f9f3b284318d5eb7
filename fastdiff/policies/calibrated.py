"""Calibration: what `fastdiff calibrate` found, and the model and run that it was found for."""

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastdiff.clock import StepClock
from fastdiff.method import Host
from fastdiff.policies.modes import MODES

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
        made._check_bound()
        for name, fits, accepted in (
                ("density", _is_density, "a number from 0 to 1, or one for each head"),
                ("modes", _is_modes, f"a letter of {MODES} for each head")):
            made._check_table(name, fits, accepted)
        stripes = made.stripes or {}
        bits = [bits for heads in stripes.values() for bits in _values(heads)] \
            if isinstance(stripes, dict) else [None]
        _need("stripes", all(isinstance(one, str) and _is_hexadecimal(one) for one in bits),
              "key blocks by layer and head, as the bits of a hexadecimal number")
        return made

    def _check_bound(self) -> None:
        """Refuse what names no model, run or layers: a file that was edited or is damaged."""
        _need("model", bool(self.model) and isinstance(self.model, dict) and all(
            map(_is_described, self.model.values())), "class and config of each denoiser")
        _need("scheduler", self.scheduler is None or _is_described(self.scheduler),
              "its class and config, or null")
        _need("steps", _is_count(self.steps), "a number of steps, 1 or more")
        _need("layers", isinstance(self.layers, list) and all(
            layer is None or (isinstance(layer, (list, tuple)) and len(layer) == 4
                              and all(map(_is_count, layer))) for layer in self.layers),
            "[heads, frames, height, width] or null for each layer")
        begins = self.begins
        _need("begins", isinstance(begins, list) and begins[:1] == [0]
              and all(map(_is_count, begins[1:])) and begins == sorted({*begins}),
              "first step of each range, 0 and then upwards")
        _need("found", isinstance(self.found, dict), "figures by name")

    def _check_table(self, name: str, fits: Callable[[Any, int], bool], accepted: str) -> None:
        table = getattr(self, name)
        if table is None:
            return
        shape = (len(self.begins), len(self.layers))
        if not isinstance(table, list) or len(table) != shape[0] or any(
                not isinstance(row, list) or len(row) != shape[1] for row in table):
            raise ValueError(f"the calibration's {name} table must have {shape[0]} ranges of "
                             f"{shape[1]} layers")
        for part, row in enumerate(table):
            for layer, (entry, known) in enumerate(zip(row, self.layers, strict=True)):
                # a layer that never ran sparse has an entry that nobody reads
                _need(f"{name} of range {part}, layer {layer}",
                      known is None or fits(entry, known[0]), accepted)

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


def _need(what: str, ok: bool, accepted: str) -> None:
    if not ok:
        raise ValueError(f"the calibration's {what} is not what `fastdiff calibrate` writes: "
                         f"accepted is {accepted}")


def _is_described(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("class"), str) \
        and isinstance(given.get("config"), dict)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_density(entry: Any, heads: int) -> bool:
    each = entry if isinstance(entry, (list, tuple)) else [entry] * heads
    return len(each) == heads and all(
        isinstance(one, (int, float)) and 0 <= one <= 1 for one in each)


def _is_modes(entry: Any, heads: int) -> bool:
    return isinstance(entry, str) and len(entry) == heads and {*entry} <= {*MODES}


def _is_hexadecimal(text: str) -> bool:
    return bool(text) and {*text.lower()} <= {*"0123456789abcdef"}


def _values(given: Any) -> list[Any]:
    return [*given.values()] if isinstance(given, dict) else [None]


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
