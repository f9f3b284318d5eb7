"""Which runs benchmarks/staged.py compares: stages for a budget, fewer steps of equal cost, a grid.

Stages are written out in whole steps, because the budgets are met to the step.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# scale -> operations of one step over those of a full-size step
Costs = Mapping[float, float]


@dataclass(frozen=True)
class Row:
    """One run. steps: of the call, None is stock's. options: of bottleneck, None runs stock.

    budget: how many times less work it is meant to take, None where it is not meant to.
    """

    name: str
    steps: int | None = None
    options: dict[str, Any] | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Stages:
    """Steps and levels of high, low and high resolution; no first high steps start low.

    low, last: noise shares where the low and the last stage begin.
    """

    first: int
    middle: int
    end: int
    scale: float = 0.5
    low: float = 0.9
    last: float = 0.75
    transition: str = "continue"

    @property
    def options(self) -> dict[str, Any]:
        parts = [f"1:{self.first}"] if self.first else []
        level = f":{self.low:g}" if self.first else ""
        parts += [f"{self.scale:g}:{self.middle}{level}", f"1:{self.end}:{self.last:g}"]
        return {"stages": ", ".join(parts), "transition": self.transition}

    def work(self, costs: Costs) -> float:
        """In full-size steps."""
        return self.first + self.end + self.middle * costs[self.scale]


def fit(
    steps: int, budget: float, costs: Costs, *, low_share: float = 0.5, first_share: float = 0.35,
    **more: Any,
) -> Stages:
    """Stages that take `steps` / `budget` full-size steps of work, as near as whole steps come.

    low_share: of all steps that are low. first_share: of the full-size steps that come first; 0
    starts low.
    """
    scale = more.get("scale", 0.5)
    target = steps / budget
    count = target / (1 - low_share + low_share * costs[scale])
    high = max(2 if first_share else 1, round(count * (1 - low_share)))
    first = 0 if not first_share else min(high - 1, max(1, round(high * first_share)))
    middle = max(1, round((target - high) / costs[scale]))
    return Stages(first, middle, high - first, **more)


def rows(
    steps: int, costs: Costs, budgets: list[float], tuned: dict[str, Any] | None = None
) -> list[Row]:
    """Stock, its steps made fewer, and stages at every budget; tuned: options found by `--tune`."""
    found = [Row("stock")]
    shares = {round(steps / budget) for budget in budgets} - {0, steps}
    found += [Row(f"{n} of {steps} steps", steps=n) for n in sorted(shares, reverse=True)]
    for budget in budgets:
        at = f"{budget:g}x"
        for transition, last in (("restart", 0.8), ("continue", 0.75), ("matched-noise", 0.75)):
            stages = fit(steps, budget, costs, last=last, transition=transition)
            found.append(Row(f"{at} {transition}", options=stages.options, budget=budget))
        for transition in ("continue", "matched-noise"):
            stages = fit(steps, budget, costs, first_share=0.0, last=0.9, transition=transition)
            found.append(
                Row(f"{at} low to high, {transition}", options=stages.options, budget=budget))
    found += [Row(f"preset {name}", options={"preset": name})
              for name in ("balanced", "fast", "video")]
    if tuned is not None:
        found.append(Row(f"{tuned['budget']:g}x tuned", options=tuned["options"],
                         budget=tuned["budget"]))
    return found


def grid(
    steps: int, costs: Costs, budget: float, count: int, seed: int = 0, slack: float = 0.06
) -> list[Row]:
    """Up to `count` stage settings of this budget, drawn from a grid over everything a stage says.

    slack: how far the work may be above the budget; whole steps do not always meet it.
    """
    shares = itertools.product(
        (0.5, 0.75), (0.35, 0.5, 0.65, 0.8), (0.0, 0.2, 0.35, 0.5), (0.97, 0.93, 0.85, 0.75),
        (0.93, 0.85, 0.75, 0.6, 0.45), ("continue", "matched-noise", "restart"))
    found: dict[str, Row] = {}
    for scale, low_share, first_share, low, last, transition in shares:
        if transition == "matched-noise" and scale != 0.5:
            continue
        if transition != "restart" and first_share and last >= low:
            continue
        stages = fit(steps, budget, costs, low_share=low_share, first_share=first_share,
                     scale=scale, low=low, last=last, transition=transition)
        if stages.work(costs) > steps / budget * (1 + slack):
            continue
        name = f"{stages.options['stages']} {transition}"
        found[name] = Row(name, options=stages.options, budget=budget)
    drawn = list(found.values())
    random.Random(seed).shuffle(drawn)
    return drawn[:count]
