"""calibrate: a plan for a density, or for a quality found by bisection over the density."""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdiff.api import as_before, find_denoisers
from fastdiff.calibration.budgets import SHARES, BudgetSearch, mean_density
from fastdiff.calibration.mode_search import ModeSearch, Rules
from fastdiff.calibration.ranges import cells_of
from fastdiff.calibration.runs import MOST_PSNR, Runs
from fastdiff.policies.base import MAX_DENSITY, Policy
from fastdiff.policies.calibrated import described
from fastdiff.policies.sparse_vdit import SparseVDiT

# bisections over density end at this precision
PRECISION = 0.01
# density of a sparse head where no density is asked for
WIDTH = 0.125


@dataclass(frozen=True)
class Goal:
    """What the plan is for; exactly one. density: mean over the calls that are sparse.
    psnr: mean over the prompts, dB to stock, at least. error: relative L2 error of the last latents
    to stock, at most."""

    density: float | None = None
    psnr: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise ValueError("a search has one goal: give a density, a target PSNR or a largest "
                             f"error, and not {' and '.join(given) or 'nothing'}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} is not possible: accepted is a number over "
                             "0, at most 1")
        if self.psnr is not None and not 0 < self.psnr < MOST_PSNR:
            raise ValueError(f"a target PSNR of {self.psnr!r} dB is not possible: accepted is over "
                             f"0 and under {MOST_PSNR:g}; 20 is a likeness, 30 is near, 40 is hard "
                             "to tell from stock")
        if self.error is not None and not 0 < self.error < 1:
            raise ValueError(f"a largest error of {self.error!r} is not possible: accepted is over "
                             "0 and under 1, such as 0.1")

    def met(self, value: float) -> bool:
        return value >= self.psnr if self.psnr is not None else value <= (self.error or 0.0)


def calibrate(
    runs: Runs, base: Policy, goal: Goal, ranges: int | None = None, rules: Rules | None = None,
    tell: Callable[[str], None] = lambda text: None,  # noqa: E731
) -> Policy:
    """The policy with the plan that was found; `config.to_plan([policy])` makes it a plan file.

    base: a sparse-vdit policy (modes are searched, by `rules`), or any other whose `density` can be
        shared out. ranges: of steps; None is one a step for modes, and four for densities.
    What is on is on again afterwards.
    """
    if not runs.prompts:
        raise ValueError("a search needs at least one prompt")
    if ranges is not None and ranges < 1:
        raise ValueError(f"ranges={ranges} is not possible: accepted is 1 or more")
    with as_before(runs.pipe):
        return _calibrated(runs, base, goal, ranges, rules, tell)


def _calibrated(
    runs: Runs, base: Policy, goal: Goal, ranges: int | None, rules: Rules | None,
    tell: Callable[[str], None],
) -> Policy:
    if base.density == 1 or goal.density == 1:
        raise ValueError("density 1 is stock attention: there is nothing to calibrate")
    base = dataclasses.replace(base, max_density=_most(runs, base), calibration=None)
    if goal.density is not None and goal.density > (base.max_density or 1.0):
        raise ValueError(
            f"density={goal.density:g} is above max_density={base.max_density:g}, where attention "
            "runs dense: ask for less, or set --option max_density=1 to calibrate all the same")
    search: _Modes | _Budgets
    if isinstance(base, SparseVDiT):
        search = _Modes(runs, base, goal, ranges, rules or Rules())
    else:
        search = _Budgets(runs, base, ranges, tell)
    if goal.density is not None:
        found = search.at(goal.density)
    else:
        found = _bisect(search.at, search.least, base.max_density or 1.0, goal, runs, tell)
    return with_found(found, {"asked_density": found.density})


class _Modes:
    def __init__(
        self, runs: Runs, base: SparseVDiT, goal: Goal, ranges: int | None, rules: Rules
    ) -> None:
        width = base.width or (goal.density / 2 if goal.density is not None else WIDTH)
        start = goal.density if goal.density is not None else 2 * width
        base = dataclasses.replace(base, width=width, density=start, modes=None)
        self.search = ModeSearch(runs, base, ranges, rules)
        self.least = width
        self._bound = bound(runs)
        self._made: SparseVDiT | None = None
        self._start = start

    def at(self, density: float) -> Policy:
        if self._made is None:
            self._made = self.search.plan(self._start, self._bound)
        return self.search.again(density, self._bound)


class _Budgets:
    least = 0.05

    def __init__(
        self, runs: Runs, base: Policy, ranges: int | None, tell: Callable[[str], None]
    ) -> None:
        self.runs, self.tell = runs, tell
        self.search = BudgetSearch(runs, base, ranges)
        self._bound = bound(runs)
        self._measured = False

    def at(self, density: float) -> Policy:
        """The best way of sharing this density out, by real runs.

        Uniform, unless another gains more than the standard error of its gain over the prompts:
        single clips differ by several dB for reasons that no plan controls.
        """
        if not self._measured:
            self.search.measure(self._bound)
            self._measured = True
        plans = {share: self.search.plan(density, share, self._bound) for share in SHARES}
        near = {share: self.runs.decibels(plan, f"{share}-{density:.4f}")
                for share, plan in plans.items()}
        best, most = SHARES[0], 0.0
        for share, each in near.items():
            gains = [a - b for a, b in zip(each, near[SHARES[0]], strict=True)]
            gain = sum(gains) / len(gains)
            doubt = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            self.tell(f"density {density:.3f} {share}: {sum(each) / len(each):.2f} dB, "
                      f"{gain:+.2f} ± {doubt:.2f} to uniform")
            if gain > max(most, doubt):
                best, most = share, gain
        cells = cells_of(self.search.ledger, self.search.begins)
        told = {"density": round(mean_density(plans[best], cells), 4),
                "latents_db": {k: round(sum(v) / len(v), 3) for k, v in near.items()}}
        return with_found(plans[best], told)


def _bisect(
    at: Callable[[float], Policy], least: float, most: float, goal: Goal, runs: Runs,
    tell: Callable[[str], None],
) -> Policy:
    """The plan of the smallest density that meets the goal."""
    def judged(density: float) -> tuple[Policy, float]:
        policy = at(density)
        kind = "psnr" if goal.psnr is not None else "error"
        value = getattr(runs, kind)(policy, f"goal-{density:.4f}")
        tell(f"density {density:.3f}: " + (f"{value:.2f} dB" if kind == "psnr"
                                           else f"relative error {value:.4f}"))
        return with_found(policy, {"goal": {kind: value}}), value

    best, value = judged(least)
    if goal.met(value):
        return best
    low, high, found = least, most, None
    while high - low > PRECISION:
        middle = round((low * high) ** 0.5, 4)
        policy, value = judged(middle)
        if goal.met(value):
            high, found = middle, policy
        else:
            low = middle
    if found is None:
        raise ValueError(f"no density up to {most:g} meets the goal for these prompts: ask for "
                         "less, give more dense steps (--option dense_steps=0.3), or allow more "
                         "(--option max_density=1)")
    return found


def _most(runs: Runs, base: Policy) -> float:
    """Above it calls run dense: the user's limit, else the break-even of the device."""
    if base.max_density is not None:
        return base.max_density
    model = next(iter(find_denoisers(runs.pipe).values()))
    return MAX_DENSITY.get(next(model.parameters()).device.type, 0.4)


def with_found(policy: Policy, figures: dict[str, Any]) -> Policy:
    """The same plan with more figures of its search."""
    assert policy.calibration is not None
    found = {**policy.calibration.found, **figures}
    return dataclasses.replace(
        policy, calibration=dataclasses.replace(policy.calibration, found=found))


def bound(runs: Runs) -> dict[str, Any]:
    """What a plan of these runs is bound to, but for the layers."""
    pipe = runs.pipe
    steps = runs.call.get("num_inference_steps")
    if not steps:
        raise ValueError("a plan is bound to a number of steps: pass num_inference_steps (--steps)")
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "model": {name: described(model) for name, model in find_denoisers(pipe).items()},
        "scheduler": None if scheduler is None else described(scheduler),
        "steps": int(steps),
    }
