"""Policy: the contract of a selection method, and the knobs that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.clock import StepClock
from fastdiff.layout import Grid, Tiling, TokenLayout, even_blocks, tiling
from fastdiff.method import Host, Method
from fastdiff.method import check as _check
from fastdiff.policies.calibrated import Calibration

# measured: docs/break-even.md
MIN_TOKENS = {"cpu": 2048, "cuda": 8192}
MAX_DENSITY = {"cpu": 0.3, "cuda": 0.6}


@dataclass(frozen=True)
class Context:
    """What a policy may know of one attention call besides its tensors.

    layer: number of this layer in order of first use; seed: a number that is the same for the same
    layer and step of a repeated run. key_mean: [B, Hk, N, D], mean key of each tile, in `select`.
    """

    layout: TokenLayout
    clock: StepClock
    layer: int
    seed: int = 0
    key_mean: Tensor | None = None


class Terms(NamedTuple):
    """The rest of an attention call: bool [B, S] of the keys that count, scale, kernel to use."""

    key_mask: Tensor | None = None
    scale: float | None = None
    impl: str = "auto"


class Attended(NamedTuple):
    """What `attend` computed: [B, S, H, D], and the kept fraction of pairs, 0-dim.

    implementation: what computed it, None for the block-sparse kernel. reason: why a kernel that
    comes first did not.
    """

    output: Tensor
    density: Tensor
    implementation: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(Method):
    """Knobs with the same meaning for every method.

    density: fraction of query-key pairs to compute, over (0, 1].
    dense_steps: first steps that stay dense; an int counts steps, a float is a fraction of them.
        More dense steps cost time and keep the picture nearer to stock.
    dense_layers: first layers that stay dense.
    tile: tokens of a tile as (frames, height, width); None cuts box-like blocks of even size.
    tail: skipped blocks still enter the softmax through their mean key and mean value.
    sink: leading frames of a clip that every query keeps exactly; None keeps the first frame where
        that takes at most a quarter of `density` (measured: docs/tile-sparse.md).
    reuse: steps for which a selection is used before it is made anew.
    min_tokens: shorter sequences stay dense; None takes the break-even of the device.
    max_density: above it the call stays dense; None takes the break-even of the device.
    seed: for methods that draw at random.
    calibration: what `fastdiff calibrate` found; a plan sets it (docs/plans.md).
    """

    kind: ClassVar[str] = "attention"

    density: float = 0.25
    dense_steps: int | float = 0.2
    dense_layers: int = 0
    tile: Grid | None = None
    tail: bool = True
    sink: int | None = None
    reuse: int = 1
    min_tokens: int | None = None
    max_density: float | None = None
    seed: int = 0
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", Calibration.read(self.calibration))
        _check(0 < self.density <= 1, "density", self.density, "a number over 0, at most 1")
        fraction_ok = not isinstance(self.dense_steps, float) or self.dense_steps <= 1
        _check(self.dense_steps >= 0 and fraction_ok, "dense_steps", self.dense_steps,
               "a number of steps (int), or a fraction from 0.0 to 1.0")
        for knob in ("dense_layers", "sink"):
            value = getattr(self, knob)
            _check(value is None or value >= 0, knob, value, "0 or more")
        _check(self.reuse >= 1, "reuse", self.reuse, "1 or more steps")
        if self.tile is not None:
            tile = tuple(self.tile)
            _check(len(tile) == 3 and all(isinstance(n, int) and n >= 1 for n in tile),
                   "tile", self.tile, "three sizes of 1 or more: (frames, height, width)")
            object.__setattr__(self, "tile", tile)

    def attach(self, host: Host) -> Callable[[], None]:
        """The seam does the work; here a plan for another model or scheduler is refused."""
        found = self.calibration
        if found is not None:
            found.check(host)
            asked = found.found.get("asked_density", self.density)
            _check(self.density == asked, "density", self.density,
                   f"{asked:g}, which the plan was found for; another needs another plan")

            def tell() -> None:
                host.report.tell(self.name, "calibrated for", found.title())
                changed = found.steps_told(host.clock.steps)
                if changed is not None:
                    host.report.tell(self.name, "plan", changed)

            host.clock.on_begin(tell)
        return lambda: None

    def at(self, context: Context) -> "Policy":
        """This policy in one layer and step: with a plan's density, where a plan has one."""
        found, index = self.calibration, context.layer
        known = found is not None and index < len(found.layers) and found.layers[index] is not None
        if found is None or not known:
            return self
        found.layer(index, None, context.layout.grid)
        if found.density is None:
            return self
        heads = found.heads(index, context.clock)
        mean = sum(heads) / len(heads) if isinstance(heads, (list, tuple)) else heads
        return replace(self, density=mean)

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        """Choose key blocks. query, key: [B, S, H, D] in tile order. None means dense."""
        raise NotImplementedError

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended | None:
        """Compute attention without a BlockMask, where each token chooses for itself.

        query, key, value: [B, S, H, D] in the order of the sequence. None: `select` decides.
        """
        return None

    @property
    def uneven(self) -> bool:
        """Whether rows of query blocks may keep very different numbers of key blocks."""
        return False

    def tiles(self, layout: TokenLayout, query: Tensor, context: Context) -> Tiling:
        """The blocks of this sequence: of 64 tokens, of 128 on a GPU for long sequences."""
        sink = self.sink
        if sink is None:
            sink = int(layout.grid[0] * self.density >= 4)
        if self.tile is not None:
            return tiling(layout, self.tile, sink, query.device)
        size = 128 if query.is_cuda and layout.tokens >= 8192 else 64
        return even_blocks(layout, size, sink, query.device)

    def stays_dense(self, layout: TokenLayout, device: str, context: Context) -> str | None:
        """Why this call is dense by the user's own settings, or None."""
        clock = context.clock
        if context.layer < self.dense_layers:
            return "dense layer"
        if clock.step is not None and clock.step < self._dense_steps(clock.steps):
            return "dense step"
        least = MIN_TOKENS.get(device, 8192) if self.min_tokens is None else self.min_tokens
        if layout.tokens < least:
            return f"fewer than min_tokens={least} tokens"
        most = MAX_DENSITY.get(device, 0.6) if self.max_density is None else self.max_density
        if self.density > most:
            return f"density {self.density:g} is above the break-even {most:g}"
        return None

    def _dense_steps(self, steps: int) -> int:
        if isinstance(self.dense_steps, float):
            return round(self.dense_steps * steps)
        return self.dense_steps
