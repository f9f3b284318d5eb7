"""Budgets: where the pairs of a given density do most good, by layer, head and range of steps."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.calibration.probe import Ledger, Probe
from fastdiff.calibration.ranges import begins_of, cells_of, filled, nothing_sparse, schedule
from fastdiff.calibration.runs import Runs
from fastdiff.policies.base import Policy
from fastdiff.policies.calibrated import Calibration

# densities at which each head is measured
TRIED = (0.04, 0.08, 0.15, 0.22, 0.3, 0.4, 0.6, 1.0)
# prompts whose runs say which parts matter
JUDGES = 2
# how a plan may share a density out
SHARES = ("uniform", "layer", "head")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Error of one part of the model over its density, and the part's share of all attention."""

    points: Points
    cost: float


def hull(points: Points) -> Points:
    """The lower convex hull: what a mixture of the measured densities can reach."""
    best: dict[float, float] = {}
    for density, error in points:
        best[density] = min(error, best.get(density, error))
    found: Points = []
    for point in sorted(best.items()):
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], point):
            found.pop()
        # more density never has to mean more error: the cheaper point is there to be taken
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def allocate(curves: list[Curve], density: float) -> list[float]:
    """Densities that minimise the sum of errors at this mean density.

    Each part starts at its least density; what is left goes, piece by piece, to the part whose
    error falls most for it. On convex curves this is the optimum.
    """
    hulls = [hull(curve.points) for curve in curves]
    found = [points[0][0] for points in hulls]
    left = sum(c.cost for c in curves) * density
    left -= sum(c.cost * d for c, d in zip(curves, found, strict=True))
    pieces = sorted(
        ((_slope(a, b) / curve.cost, i, b[0] - a[0])
         for i, (curve, points) in enumerate(zip(curves, hulls, strict=True))
         for a, b in zip(points, points[1:], strict=False)),
        key=lambda piece: piece[0])
    for _, i, length in pieces:
        if left <= 0:
            break
        taken = min(length, left / curves[i].cost)
        found[i] += taken
        left -= taken * curves[i].cost
    return found


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


class BudgetSearch:
    """Curves from one probed generation a prompt; importance of layers and ranges from real runs.

    The importance of a layer is the error of the last latents when that layer alone is sparse, that
    of a range when it alone is; a part of both gets their product. So an error that later layers
    and steps repair counts little.
    """

    def __init__(self, runs: Runs, base: Policy, ranges: int | None) -> None:
        self.runs, self.base = runs, base
        self.ranges = 4 if ranges is None else ranges
        # calls of density 1 are dense, not sparse with every block
        self.most = min(base.max_density or 1.0, 0.999)
        self.base = dataclasses.replace(base, max_density=self.most)
        self.tried = [d for d in TRIED if d <= self.most or self.most == 0.999]
        self.ledger = Ledger()
        self.begins: list[int] = []
        self.importance: dict[tuple[int, int], float] = {}

    def measure(self, bound: dict[str, Any]) -> None:
        """Everything that does not depend on the density asked for."""
        for prompt in range(len(self.runs.prompts)):
            state = self.runs.work.part(f"curves-{prompt}", lambda p=prompt: self._curves(p))
            self.ledger.merge(Ledger(**state))
        if not self.ledger.error:
            raise ValueError(nothing_sparse(self.base))
        spread = max(float(d.mean(1).max() - d.mean(1).min()) for d in self.ledger.density.values())
        if spread < 0.01:
            raise ValueError(f"what {self.base.name} keeps does not depend on density with these "
                             "options, so there is nothing to share out: leave out those that fix "
                             "it, such as a window or top_k")
        self.begins = begins_of(sorted({step for step, _ in self.ledger.error}), self.ranges)
        cells = cells_of(self.ledger, self.begins)
        layers = sorted({layer for _, layer in cells})
        ranges = range(len(self.begins))
        weight: dict[tuple[str, int], float] = {}
        for kind, members in (("layer", layers), ("range", ranges)):
            for member in members:
                at = 1 if kind == "layer" else 0
                table = {cell: self.base.density if cell[at] == member else 1.0 for cell in cells}
                policy = self._policy(table, bound)
                off = self.runs.error(policy, f"{kind}-{member}", JUDGES)
                weight[kind, member] = off * off
        total = {kind: sum(w for (k, _), w in weight.items() if k == kind) or 1.0
                 for kind in ("layer", "range")}
        self.importance = {
            (part, layer): weight["layer", layer] / total["layer"]
            * weight["range", part] / total["range"] for part, layer in cells}

    def plan(self, density: float, share: str, bound: dict[str, Any]) -> Policy:
        """The policy that shares `density` out: "uniform", by "layer", or by "head"."""
        cells = cells_of(self.ledger, self.begins)
        if share == "uniform":
            return self._policy(dict.fromkeys(cells, density), bound, density, share)
        curves, places = [], []
        for place, cell in cells.items():
            heads = cell.energy.numel()
            members = [list(range(heads))] if share == "layer" else [[h] for h in range(heads)]
            scale = self.importance[place] / max(1e-30, self._reference(cell))
            for member in members:
                points = [(float(d[member].mean()), float(e[member].sum()) * scale)
                          for d, e in zip(cell.density, cell.error, strict=True)]
                curves.append(Curve(points, cell.tokens**2.0 * len(member)))
                places.append(place)
        found = allocate(curves, density)
        table: dict[tuple[int, int], Any] = {}
        for place, value in zip(places, found, strict=True):
            value = round(min(1.0, value), 4)
            table[place] = value if share == "layer" else [*table.get(place, []), value]
        return self._policy(table, bound, density, share)

    def _reference(self, cell: Any) -> float:
        """Error of a part at the density at which its importance was measured."""
        mean = cell.density.mean(1)
        return float(cell.error[(mean - self.base.density).abs().argmin()].sum())

    def _policy(
        self, table: dict[tuple[int, int], Any], bound: dict[str, Any],
        density: float | None = None, share: str = "",
    ) -> Policy:
        count = max(self.ledger.layers) + 1
        rows = [[table.get((part, layer)) for layer in range(count)]
                for part in range(len(self.begins))]
        filled(rows, None)
        rows = [[1.0 if value is None else value for value in row] for row in rows]
        calibration = Calibration(
            **bound, layers=[self.ledger.layers.get(i) for i in range(count)], begins=self.begins,
            density=rows, found={"share": share} if share else {})
        return dataclasses.replace(self.base, density=density or self.base.density,
                                   calibration=calibration)

    def _curves(self, prompt: int) -> dict[str, Any]:
        ledger = Ledger()
        candidates = tuple(dataclasses.replace(self.base, density=d, calibration=None)
                           for d in self.tried)
        probe = Probe(**schedule(self.base), candidates=candidates, ledger=ledger)
        self.runs.generate(prompt, probe, "error curves", "latent")
        return ledger.state()


def mean_density(policy: Policy, cells: dict[tuple[int, int], Any]) -> float:
    """Mean density of a plan's table over the calls that were measured."""
    assert policy.calibration is not None and policy.calibration.density is not None
    kept = cost = 0.0
    for (part, layer), cell in cells.items():
        value = policy.calibration.density[part][layer]
        mean = float(torch.as_tensor(value, dtype=torch.float64).mean())
        weight = cell.tokens**2.0 * cell.energy.numel()
        kept, cost = kept + mean * weight, cost + weight
    return kept / cost

