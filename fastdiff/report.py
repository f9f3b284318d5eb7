"""Report: what ran, per layer: density, operations, time, and why calls were dense."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("fastdiff")

# calls of a layer that are remembered one by one; training goes on for longer than any run
RECENT = 1024


@dataclass
class LayerReport:
    """Counts of one attention layer over one run."""

    name: str
    index: int = -1
    policy: str = ""
    sparse_calls: int = 0
    dense_calls: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)
    implementation: str = ""
    _density: list[Tensor] = field(default_factory=list, repr=False)
    _pairs: list[float] = field(default_factory=list, repr=False)
    dense_flops: float = 0.0
    tail_flops: float = 0.0
    _clock: list[Any] = field(default_factory=list, repr=False)
    # of the calls before the recent ones: sum of densities, operations kept and stock, seconds
    _older: list[Any] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0], repr=False)

    def sparse(self, density: Tensor, flops: float, tail_flops: float) -> None:
        """A sparse call that would have cost `flops` when dense. Keeps the tensor: no sync."""
        self.sparse_calls += 1
        self._density.append(density)
        self._pairs.append(flops)
        self.tail_flops += tail_flops
        if len(self._density) >= 2 * RECENT:
            self._settle()

    def dense(self, reason: str, flops: float, fallback: bool) -> None:
        (self.fallbacks if fallback else self.dense_calls)[reason] += 1
        self.dense_flops += flops

    def timed(self, seconds_or_events: Any) -> None:
        self._clock.append(seconds_or_events)
        if len(self._clock) >= 2 * RECENT:
            self._older[3] += _seconds(self._clock[:RECENT])
            del self._clock[:RECENT]

    def _settle(self) -> None:
        """Add up the older calls, on the device they ran on."""
        density = torch.stack(self._density[:RECENT]).float()
        pairs = self._pairs[:RECENT]
        self._older[0] += density.sum()
        self._older[1] += density @ torch.tensor(pairs, dtype=torch.float32, device=density.device)
        self._older[2] += sum(pairs)
        del self._density[:RECENT], self._pairs[:RECENT]

    @property
    def density(self) -> float:
        """Realised density over the sparse calls."""
        if not self._density:
            return 1.0
        recent = torch.stack([d.cpu().double() for d in self._density]).sum()
        return float(self._older[0] + recent.item()) / self.sparse_calls

    @property
    def densities(self) -> list[float]:
        """Realised density of each sparse call, in order; of the last 1024 to 2047 at most."""
        return [float(d) for d in self._density]

    @property
    def flops(self) -> tuple[float, float]:
        """(computed, stock) floating-point operations of attention over all calls."""
        stock = self.dense_flops + self._older[2] + sum(self._pairs)
        kept = float(self._older[1])
        kept += sum(float(d) * f for d, f in zip(self._density, self._pairs, strict=True))
        return self.dense_flops + self.tail_flops + kept, stock

    @property
    def seconds(self) -> float:
        return self._older[3] + _seconds(self._clock)


@dataclass
class Report:
    """All layers of a pipeline over its last run."""

    layers: list[LayerReport] = field(default_factory=list)
    # method name -> what it counted and told
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    # what a method left stock unasked, by place and reason
    stock: Counter = field(default_factory=Counter)
    _logged: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def count(self, method: str, what: str, n: float = 1) -> None:
        """Add `n` to a figure of this run that `pipe.fastdiff` prints under the method's name."""
        told = self.methods.setdefault(method, {})
        told[what] = told.get(what, 0) + n

    def tell(self, method: str, what: str, value: Any) -> None:
        """Set a figure or a few words that `pipe.fastdiff` prints under the method's name."""
        self.methods.setdefault(method, {})[what] = value

    def explain(self, method: str, what: str, reason: str) -> None:
        """Tell why a method went another way to the same result; logged the first time."""
        self.tell(method, what, reason)
        if (method, what) not in self._logged:
            self._logged.add((method, what))
            logger.warning("%s: %s %s (further calls are only told)", method, what, reason)

    def reset(self) -> None:
        self.methods.clear()
        self.stock.clear()
        for i, layer in enumerate(self.layers):
            self.layers[i] = LayerReport(layer.name, layer.index, layer.policy)

    def finish(self) -> None:
        """Read every timer of the device; what is left is plain data, which can be kept."""
        for layer in self.layers:
            layer._older[3] = layer.seconds
            layer._clock.clear()

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer that was called, in order of use."""
        used = [layer for layer in self.layers if layer.index >= 0]
        return [_row(layer) for layer in sorted(used, key=lambda layer: layer.index)]

    def summary(self) -> dict[str, Any]:
        """Totals over all layers: calls, density, floating-point operations, seconds, fallbacks."""
        rows = self.rows()
        computed = sum(row["flops"] for row in rows)
        stock = sum(row["stock_flops"] for row in rows)
        sparse = [row for row in rows if row["sparse_calls"]]
        calls = sum(row["sparse_calls"] for row in sparse)
        fallbacks: Counter = Counter(self.stock)
        dense: Counter = Counter()
        for row in rows:
            fallbacks.update(row["fallbacks"])
            dense.update(row["dense_calls"])
        kept = sum(row["density"] * row["sparse_calls"] for row in sparse)
        return {
            "layers": len(rows),
            "sparse_calls": calls,
            "dense_calls": dict(dense),
            "fallbacks": dict(fallbacks),
            "density": kept / calls if calls else 1.0,
            "density_all_calls": computed / stock if stock else 1.0,
            "flops": computed,
            "stock_flops": stock,
            "seconds": sum(row["seconds"] for row in rows),
            "methods": {name: dict(told) for name, told in self.methods.items()},
        }

    def __str__(self) -> str:
        rows = self.rows()
        told = [f"{name}: {', '.join(f'{what} {_short(value)}' for what, value in facts.items())}"
                for name, facts in self.methods.items()]
        told += [f"RUNS STOCK, {n} times: {why}" for why, n in self.stock.items()]
        if not rows:
            return "\n".join(told) or "nothing has run yet"
        total = self.summary()
        # whole names: those of a UNet differ at their beginning alone
        wide = max(len(row["layer"]) for row in rows)
        lines = [f"{'layer':<{wide}} {'impl':<9} {'sparse':>6} {'dense':>6} {'density':>8} "
                 f"{'saved':>6} {'ms':>9}"]
        for row in rows:
            dense = sum(row["dense_calls"].values()) + sum(row["fallbacks"].values())
            saved = 1 - row["flops"] / row["stock_flops"] if row["stock_flops"] else 0.0
            lines.append(f"{row['layer']:<{wide}} {row['implementation'] or '-':<9} "
                         f"{row['sparse_calls']:>6} {dense:>6} {row['density']:>8.3f} "
                         f"{saved:>6.0%} {row['seconds'] * 1e3:>9.1f}")
        lines.append(f"attention operations: {total['flops']:.3g} of {total['stock_flops']:.3g} "
                     f"({total['density_all_calls']:.0%}); density in sparse calls "
                     f"{total['density']:.3f}; {total['seconds']:.2f} s in the op")
        lines += [f"dense by setting, {n} calls: {why}" for why, n in total["dense_calls"].items()]
        lines += [f"DENSE FALLBACK, {n} calls: {why}" for why, n in total["fallbacks"].items()
                  if why not in self.stock]
        return "\n".join([*lines, *told])


def _seconds(clock: list[Any]) -> float:
    total = 0.0
    for entry in clock:
        if isinstance(entry, float):
            total += entry
        else:
            begin, end = entry
            end.synchronize()
            total += begin.elapsed_time(end) / 1000
    return total


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(layer: LayerReport) -> dict[str, Any]:
    computed, stock = layer.flops
    return {
        "layer": layer.name,
        "index": layer.index,
        "policy": layer.policy,
        "implementation": layer.implementation,
        "sparse_calls": layer.sparse_calls,
        "dense_calls": dict(layer.dense_calls),
        "fallbacks": dict(layer.fallbacks),
        "density": layer.density,
        "flops": computed,
        "stock_flops": stock,
        "seconds": layer.seconds,
    }
