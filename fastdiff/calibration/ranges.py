"""Ranges of steps, and the sums of a ledger over them."""

from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.calibration.probe import Ledger
from fastdiff.policies.base import Policy

# knobs that say which calls are sparse at all
_SCHEDULE = ("dense_steps", "dense_layers", "min_tokens", "sink", "seed")


class Cell(NamedTuple):
    """One range of steps in one layer: sums as in `Ledger`, density as a mean, tokens a call."""

    error: Tensor
    energy: Tensor
    numbers: float
    density: Tensor
    tokens: int


def begins_of(steps: list[int], ranges: int | None) -> list[int]:
    """First step of each range: one a step, or `ranges` of about equal length."""
    if not steps:
        return [0]
    count = len(steps) if ranges is None else min(ranges, len(steps))
    found = [steps[len(steps) * i // count] for i in range(count)]
    # dense steps before the first sparse one belong to no range; a run with other steps may ask
    return [0, *found[1:]]


def cells_of(ledger: Ledger, begins: list[int]) -> dict[tuple[int, int], Cell]:
    """Sums by (range, layer), in that order."""
    found: dict[tuple[int, int], Cell] = {}
    calls: dict[tuple[int, int], int] = {}
    for step, layer in sorted(ledger.error):
        part = max(i for i, begin in enumerate(begins) if begin <= step)
        key, place = (step, layer), (part, layer)
        now = Cell(ledger.error[key], ledger.energy[key], ledger.numbers[key],
                   ledger.density[key], 0)
        if place in found:
            before = found[place]
            now = Cell(before.error + now.error, before.energy + now.energy,
                       before.numbers + now.numbers, before.density + now.density, 0)
        found[place] = now
        calls[place] = calls.get(place, 0) + ledger.calls[key]
    return {place: cell._replace(density=cell.density / calls[place], tokens=_tokens(ledger, place))
            for place, cell in sorted(found.items())}


def filled(rows: list[list[Any]], empty: Any) -> None:
    """Give a layer that did not run in some range the entry of the nearest range where it did.

    Such are the two experts of Wan 2.2; a run with other steps may ask for them elsewhere.
    """
    for layer in range(len(rows[0])):
        known = [i for i, row in enumerate(rows) if row[layer] != empty]
        for i, row in enumerate(rows):
            if known and row[layer] == empty:
                row[layer] = rows[min(known, key=lambda k: abs(k - i))][layer]


def schedule(base: Policy) -> dict[str, Any]:
    """Knobs of a probe that is asked exactly where `base` would be sparse."""
    return {**{knob: getattr(base, knob) for knob in _SCHEDULE}, "max_density": 1.0}


def nothing_sparse(base: Policy) -> str:
    """Why a search saw no call."""
    least = "the break-even of the device" if base.min_tokens is None else base.min_tokens
    return ("no attention call of this run would be sparse, so there is nothing to calibrate: "
            f"the sequence is shorter than min_tokens ({least}), or all steps or layers are dense "
            f"(dense_steps={base.dense_steps}, dense_layers={base.dense_layers})")


def _tokens(ledger: Ledger, place: tuple[int, int]) -> int:
    _, t, h, w = ledger.layers[place[1]]
    return t * h * w
