"""The search of Sparse-vDiT: losses of the modes in real generations, and the choice among them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.calibration.probe import NOTHING, STOCK, Ledger, MassProbe, Probe
from fastdiff.calibration.ranges import begins_of, cells_of, filled, nothing_sparse, schedule
from fastdiff.calibration.runs import Runs
from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Context
from fastdiff.policies.calibrated import Calibration
from fastdiff.policies.modes import FULL, SKIP, STRIPES, to_bits
from fastdiff.policies.sparse_vdit import SparseVDiT

# order of the candidates in every table here
CANDIDATES = "dmv"
LOSSES = ("relative", "raw")


@dataclass(frozen=True)
class Rules:
    """How the modes are chosen.

    loss: "relative" error of a head's output (squared, a skipped head has 1), or "raw" mean square
    error as in the paper. penalty: the paper's lambda, times density. eps: largest loss of a head
    that does not stay full; None finds the one that meets the density asked for. max_skip: largest
    share of heads that may be skipped. rounds: passes; each is measured on the generation that the
    table of the pass before makes, as the paper's search sees its own errors.
    """

    loss: str = "relative"
    penalty: float = 0.5
    eps: float | None = None
    max_skip: float = 0.03
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not possible: accepted is one of "
                             f"{', '.join(LOSSES)}")
        for name, ok, accepted in (
                ("penalty", self.penalty >= 0, "0 or more"),
                ("max_skip", 0 <= self.max_skip <= 1, "a share from 0 to 1"),
                ("rounds", self.rounds >= 1, "1 or more passes")):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible: accepted is "
                                 f"{accepted}")


@dataclass(frozen=True)
class Table:
    """Losses of every (range, layer, head), flat.

    sparse: [M, 3] for d, m, v; skip: [M]; density: [M, 3]; cost: [M], share of all attention that
    a full head is; they sum to 1.
    """

    sparse: Tensor
    skip: Tensor
    density: Tensor
    cost: Tensor

    def of(self, modes: list[str]) -> float:
        """Mean density of a choice."""
        full = [1.0 if m == FULL else 0.0 for m in modes]
        kept = torch.tensor(full, dtype=torch.float64)
        for number, mode in enumerate(CANDIDATES):
            chosen = torch.tensor([m == mode for m in modes])
            kept = torch.where(chosen, self.density[:, number], kept)
        return float((kept * self.cost).sum())


def choose(table: Table, eps: float, max_skip: float) -> list[str]:
    """Per head the mode of least loss, full where every loss exceeds `eps`."""
    least, mode = table.sparse.min(1)
    wish = table.skip < least
    # where more heads ask to be skipped than may be, those that gain most by it are
    gain = torch.where(wish & (table.skip <= eps), least - table.skip, -torch.inf)
    allowed = int(max_skip * len(gain) + 1e-9)
    skipped = {*gain.argsort(descending=True, stable=True)[:allowed].tolist()}
    return [SKIP if i in skipped and gain[i] > -torch.inf
            else CANDIDATES[int(mode[i])] if least[i] <= eps else FULL
            for i in range(len(gain))]


def eps_for(table: Table, density: float, max_skip: float) -> float:
    """The smallest eps at which the mean density is at most `density`."""
    tried = torch.cat([table.sparse.min(1).values, table.skip]).unique().tolist()
    least = table.of(choose(table, tried[-1], max_skip))
    if least > density + 1e-6:
        raise ValueError(f"density={density:g} cannot be met: with every head sparse it is "
                         f"{least:.3f}; ask for more, or give a smaller width")
    low, high = -1, len(tried) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if table.of(choose(table, tried[middle], max_skip)) <= density + 1e-6:
            high = middle
        else:
            low = middle
    return tried[high]


def losses(ledger: Ledger, begins: list[int], rules: Rules) -> tuple[Table, list[tuple[int, int]]]:
    """The table of a ledger, and which (range, layer) its rows belong to, heads in turn."""
    rows, places = cells_of(ledger, begins), []
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for place, cell in rows.items():
        heads = cell.energy.numel()
        if rules.loss == "relative":
            scale = cell.energy.clamp_min(1e-30)
            skip = torch.ones(heads, dtype=torch.float64)
        else:
            scale = torch.full((heads,), cell.numbers, dtype=torch.float64)
            skip = cell.energy / scale
        density = cell.density.T
        parts.append(((cell.error / scale).T + rules.penalty * density, skip, density,
                      torch.full((heads,), cell.tokens**2.0)))
        places += [place] * heads
    sparse, skip, density, cost = (torch.cat(part) for part in zip(*parts, strict=True))
    return Table(sparse, skip, density, cost / cost.sum()), places


class ModeSearch:
    """One search: stripes from measured mass, then `rules.rounds` passes of losses and choice."""

    def __init__(self, runs: Runs, base: SparseVDiT, ranges: int | None, rules: Rules) -> None:
        self.runs, self.base, self.ranges, self.rules = runs, base, ranges, rules
        self.stripes: dict[str, dict[str, str]] = {}
        self._last = Ledger()

    def plan(self, density: float, bound: dict[str, Any]) -> SparseVDiT:
        """The policy with its table, measured over all rounds at this density."""
        runs, rules = self.runs, self.rules
        found = runs.work.part("stripes", self._measure_stripes)
        self.stripes = found["stripes"]
        # block numbers mean something for these tiles only
        self.base = dataclasses.replace(self.base, tile=found["tile"])
        policy: SparseVDiT | None = None
        for number in range(rules.rounds):
            self._last = self._pass(number, policy)
            policy = self.choice(self._last, density, bound)
        assert policy is not None
        return policy

    def again(self, density: float, bound: dict[str, Any]) -> SparseVDiT:
        """The table at another density, from the losses of the last round."""
        return self.choice(self._last, density, bound)

    def choice(self, ledger: Ledger, density: float, bound: dict[str, Any]) -> SparseVDiT:
        """The table that a ledger's losses give at this density."""
        rules = self.rules
        begins = begins_of(sorted({step for step, _ in ledger.error}), self.ranges)
        table, places = losses(ledger, begins, rules)
        eps = rules.eps if rules.eps is not None else eps_for(table, density, rules.max_skip)
        modes = choose(table, eps, rules.max_skip)
        count = max(ledger.layers) + 1
        bound = {**bound, "layers": [ledger.layers.get(i) for i in range(count)]}
        rows = [[""] * count for _ in begins]
        for (part, layer), mode in zip(places, modes, strict=True):
            rows[part][layer] += mode
        filled(rows, "")
        used = {str(layer): {str(head): self.stripes[str(layer)][str(head)]
                             for head in range(ledger.layers[layer][0])
                             if any(row[layer][head:head + 1] == STRIPES for row in rows)}
                for layer in ledger.layers}
        found = {"density": round(table.of(modes), 4), "eps": eps, "loss": rules.loss,
                 "penalty": rules.penalty,
                 "modes": {mode: round(modes.count(mode) / len(modes), 4) for mode in "fsdmv"}}
        calibration = Calibration(**bound, begins=begins, modes=rows, found=found,
                                  stripes={k: v for k, v in used.items() if v})
        return dataclasses.replace(self.base, density=density, calibration=calibration)

    def _pass(self, number: int, policy: SparseVDiT | None) -> Ledger:
        total = Ledger()
        for prompt in range(len(self.runs.prompts)):
            state = self.runs.work.part(
                f"round-{number}-{prompt}", lambda p=prompt: self._measure(number, p, policy))
            total.merge(Ledger(**state))
        if not total.error:
            raise ValueError(nothing_sparse(self.base))
        return total

    def _measure(self, number: int, prompt: int, policy: SparseVDiT | None) -> dict[str, Any]:
        ledger = Ledger()
        fixed = Calibration(model={}, scheduler=None, steps=1, layers=[], begins=[0],
                            stripes=self.stripes)
        candidates = tuple(dataclasses.replace(self.base, modes=mode, calibration=fixed,
                                               width=self.base.band) for mode in CANDIDATES)

        def follow(context: Context, heads: int) -> list[int]:
            assert policy is not None
            modes = policy.modes_of(context, heads)
            return [STOCK if m == FULL else NOTHING if m == SKIP else CANDIDATES.index(m)
                    for m in modes]

        probe = Probe(**schedule(self.base), candidates=candidates, ledger=ledger,
                      follow=None if policy is None else follow)
        self.runs.generate(prompt, probe, f"pass {number + 1}", "latent")
        return ledger.state()

    def _measure_stripes(self) -> dict[str, Any]:
        """Per layer and head the blocks of most mass, as many as fit into the width."""
        total: dict[int, Tensor] = {}
        seen: dict[int, list[int]] = {}
        for prompt in range(len(self.runs.prompts)):
            mass, shapes = self.runs.work.part(f"mass-{prompt}", lambda p=prompt: self._mass(p))
            for layer, blocks in mass.items():
                total[layer] = total.get(layer, 0) + blocks
            seen.update(shapes)
        if not total:
            raise ValueError(nothing_sparse(self.base))
        stripes: dict[str, dict[str, str]] = {}
        for layer, mass in total.items():
            t, h, w, before, after, *tile = seen[layer]
            found = self.base.patterns(TokenLayout((t, h, w), before, after),
                                       (tile[0], tile[1], tile[2]), torch.device("cpu"))
            grid = (~found.text).nonzero()[:, 0]
            order = [grid[one.argsort(descending=True, stable=True)] for one in mass]
            kept = [found.stripes(one)[grid] for one in order]
            stripes[str(layer)] = {str(i): to_bits(one) for i, one in enumerate(kept)}
        tiles = {tuple(shape[5:]) for shape in seen.values()}
        return {"stripes": stripes, "tile": tiles.pop() if len(tiles) == 1 else None}

    def _mass(self, prompt: int) -> tuple[dict, dict]:
        mass: dict[int, Tensor] = {}
        seen: dict[int, list[int]] = {}
        probe = MassProbe(**schedule(self.base), base=self.base, mass=mass, seen=seen)
        self.runs.generate(prompt, probe, "attention mass", "latent")
        return mass, seen
