"""Neighborhood attention: every query sees a window of the grid around it."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.kernels.window_attention import Window, window_attention
from fastdiff.kernels.window_attention import chosen as chosen_kernel
from fastdiff.layout import Grid, Tiling, TokenLayout, auto_tile, remembered
from fastdiff.method import check
from fastdiff.policies.base import Attended, Context, Policy, Terms
from fastdiff.policies.gathered import Gather, gathered_attention
from fastdiff.policies.partition import axis_product, block_size, blocks_of, grid_density
from fastdiff.policies.static import Pattern, pattern
from fastdiff.policies.windows import Axis, axis, cut_blocks, cut_tiles

PATHS = ("auto", "blocks", "windows", "gathered")
AXES = "thw"
# borders of windows may cut tiles into so many blocks each before gathering is cheaper
PIECES = 4


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Policy):
    """A window over frames, height and width, as NATTEN defines it, and always all text.

    Windows shift inward at borders, so every query sees equally many tokens. Axes of one token are
    left out: a picture has two, a plain sequence one. Text queries see everything.

    window: (frames, height, width) tokens that a query sees; numbers with a point are shares of the
        axis, which fit every level of a UNet. None: as large as `density` says, whole tiles.
    stride: so many neighbours along an axis share one window, and skip the work at its rim. None:
        whole tiles, where the window allows it; (1, 1, 1) slides by single tokens.
    dilation: distance between the tokens of a window. None: 1.
    causal: axes that look back only, letters out of "thw".
    alternate: odd layers take the widest dilation that fits, even layers none (DiNAT).
    path: how it is computed, with one result: "blocks" cuts tiles where windows end and runs on the
        block-sparse kernel; "windows" runs on a kernel of its own, on a GPU, without gradients,
        dilation or sink; "gathered" masks inside the tiles with torch. "auto" takes blocks unless
        they get too small, then windows where that kernel can run. The pooled tail needs blocks.

    Sources: arXiv 2204.07143 (window), 2209.15001 (dilation, alternation), 2504.16922 (stride).
    Cost: the window's share of dense attention with a stride of whole tiles; with a stride of one
    also the rim of every tile. Limits: nothing outside the window is seen; made for
    trained models, so keep windows large.
    """

    name: ClassVar[str] = "neighborhood"
    summary: ClassVar[str] = "a window around each query, as in NATTEN"

    tail: bool = False
    sink: int | None = 0
    window: tuple[int, int, int] | tuple[float, float, float] | None = None
    stride: tuple[int, int, int] | None = None
    dilation: tuple[int, int, int] | None = None
    causal: str = ""
    alternate: bool = False
    path: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.path in PATHS, "path", self.path, f"one of {', '.join(PATHS)}")
        check(not (self.tail and self.path in ("windows", "gathered")), "tail", self.tail,
              f"False with path={self.path!r}")
        if self.path == "windows":
            for knob in ("sink", "dilation", "alternate"):
                value = getattr(self, knob)
                check(value in (None, 0, False, (1, 1, 1)), knob, value,
                      "none of it with path='windows'")
        check(isinstance(self.causal, str) and set(self.causal) <= set(AXES), "causal",
              self.causal, "letters out of 'thw': time, height, width")
        check(not (self.alternate and self.dilation), "dilation", self.dilation,
              "None with alternate=True, which sets it")
        for knob in ("window", "stride", "dilation"):
            value = getattr(self, knob)
            if value is not None:
                sides = tuple(value) if isinstance(value, (tuple, list)) else ()
                check(len(sides) == 3 and all(_possible(n, knob) for n in sides), knob, value,
                      "three numbers (frames, height, width) of 1 or more"
                      + ("; or shares over 0.0, at most 1.0" if knob == "window" else ""))
                object.__setattr__(self, knob, sides)
        for i, name in enumerate(AXES):
            if self.window and self.stride and isinstance(self.window[i], int):
                check(self.stride[i] <= self.window[i], "stride", self.stride,
                      f"at most the window {self.window} on each axis, {name} is over it")

    def axes(self, layout: TokenLayout, tile: Grid, layer: int) -> tuple[Axis, Axis, Axis]:
        """The windows of each axis in this layer. Raises ValueError where they do not fit."""
        sizes = self._sizes(layout, tile, self.alternate and layer % 2 == 1)
        t, h, w = (
            axis(n, k, s, d, causal=name in self.causal)
            for name, n, (k, s, d) in zip(AXES, layout.grid, sizes, strict=True)
        )
        return t, h, w

    def _sizes(
        self, layout: TokenLayout, tile: Grid, widest: bool
    ) -> list[tuple[int, int, int]]:
        """(window, stride, dilation) of each axis; an axis of one token has ones."""
        dilation = self.dilation or (1, 1, 1)
        if self.window is None:
            limits = [n // d for n, d in zip(layout.grid, dilation, strict=True)]
            for i, name in enumerate(AXES):
                _fits(layout.grid[i] == 1 or limits[i] >= 1, "dilation", dilation[i], name,
                      layout.grid, f"1 to {layout.grid[i]}")
            share = grid_density(layout, self.density)
            window = fit_window(layout.grid, tile, share, tuple(limits), self.stride)
        else:
            window = tuple(
                n if isinstance(n, int) else max(1, round(n * size))
                for n, size in zip(self.window, layout.grid, strict=True)
            )
        found = []
        for i, (name, size) in enumerate(zip(AXES, layout.grid, strict=True)):
            if size == 1:
                found.append((1, 1, 1))
                continue
            k, d = window[i], dilation[i]
            _fits(k <= size, "window", k, name, layout.grid,
                  f"1 to {size}, or a share of the axis such as 0.5")
            _fits(k * d <= size, "dilation", d, name, layout.grid,
                  f"1 to {size // k} with a window of {k}")
            s = aligned_stride(k, tile[i]) if self.stride is None else self.stride[i]
            _fits(s <= k, "stride", s, name, layout.grid, f"1 to {k}, the window")
            found.append((k, s, size // k if widest else d))
        return found

    def exact_window(self, layout: TokenLayout, tile: Grid, layer: int) -> Window | None:
        """The windows of this layer as the kernel for them takes them; None where some dilate."""
        sizes = self._sizes(layout, tile, self.alternate and layer % 2 == 1)
        window, stride, dilation = zip(*sizes, strict=True)
        if dilation != (1, 1, 1):
            return None
        t, h, w = (name in self.causal for name in AXES)
        return Window(layout.grid, window, stride, (t, h, w))

    def _plan(self, query: Tensor, context: Context) -> "Plan":
        layout = context.layout
        tile = self.tile or auto_tile(layout.grid, block_size(layout, query))
        tile = tuple(min(t, n) for t, n in zip(tile, layout.grid, strict=True))
        lead = min(self.sink or 0, layout.grid[0])
        layer = context.layer % 2 if self.alternate else 0
        # what a calibration holds is in the density already, and cannot be a key
        policy = self if self.calibration is None else replace(self, calibration=None)
        return _plan(policy, layout, (tile[0], tile[1], tile[2]), lead, layer, query.device)

    def tiles(self, layout: TokenLayout, query: Tensor, context: Context) -> Tiling:
        return self._plan(query, context).tiles

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        plan = self._plan(query, context)
        return plan.pattern.expand(query.shape[0], query.shape[2], tiles)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended | None:
        plan = self._plan(query, context)
        reason = None
        if plan.window is not None:
            impl, reason = self._kernel(query, key, value, terms)
            if impl is not None:
                out = window_attention(
                    query, key, value, grid=plan.window.grid, window=plan.window.window,
                    stride=plan.window.stride, causal=plan.window.causal,
                    before=context.layout.before, key_mask=terms.key_mask, scale=terms.scale,
                    impl=impl)
                return Attended(out, plan.density, f"windows, {impl}")
        if plan.gather is None:
            return None
        out = gathered_attention(query, key, value, plan.gather, terms)
        return Attended(out, plan.density, "gathered", reason)

    def _kernel(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms
    ) -> tuple[str | None, str | None]:
        """What computes windows in this call, or, in path "auto", why nothing can."""
        try:
            if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
                raise ValueError("path='windows' has no gradients; path='auto' finds one that does")
            return chosen_kernel(query, key, value, impl=terms.impl), None
        except ValueError as refusal:
            if self.path == "windows":
                raise
            return None, str(refusal)


class Plan:
    """All that is the same at every call with one layout: made once, on the host."""

    gather: Gather | None = None
    window: Window | None = None
    tiles: Tiling
    pattern: Pattern
    density: Tensor


@remembered(256)
def _plan(
    policy: Neighborhood, layout: TokenLayout, tile: Grid, lead: int, layer: int,
    device: torch.device,
) -> Plan:
    axes = policy.axes(layout, tile, layer)
    cuts = [cut_blocks(axes[0], tile[0], lead)]
    cuts += [cut_blocks(a, t) for a, t in zip(axes[1:], tile[1:], strict=True)]
    blocks = math.prod(keep.shape[0] for _, keep in cuts)
    plain = math.prod(math.ceil(n / t) for n, t in zip(layout.grid, tile, strict=True))
    plan = Plan()
    small = policy.path == "auto" and not policy.tail and blocks > PIECES * plain
    if policy.path in ("windows", "gathered") or small:
        if policy.path != "gathered" and not lead:
            plan.window = policy.exact_window(layout, tile, layer)
        if policy.path != "windows":
            plan.gather = _gather(layout, axes, tile, lead, device)
        plan.density = torch.tensor(_density(layout, axes, lead), device=device)
        return plan
    ids = axis_product(*(block for block, _ in cuts))
    plane = layout.grid[1] * layout.grid[2]
    leading = torch.arange(layout.grid_tokens) < lead * plane
    plan.tiles = blocks_of(layout, ids, math.prod(tile), device, always=leading)
    (t, h, w) = (keep for _, keep in cuts)
    seen = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    first = -(-layout.before // math.prod(tile))
    keep = torch.zeros(plan.tiles.blocks, plan.tiles.blocks, dtype=torch.bool)
    keep[first : first + blocks, first : first + blocks] = seen.reshape(blocks, blocks)
    keep = keep.to(device) | plan.tiles.always | plan.tiles.dense_rows[:, None]
    plan.pattern = pattern(keep, plan.tiles)
    return plan


def _gather(
    layout: TokenLayout, axes: tuple[Axis, Axis, Axis], tile: Grid, lead: int, device: torch.device
) -> Gather:
    t, h, w = (cut_tiles(a, n).to(device) for a, n in zip(axes, tile, strict=True))
    token = torch.arange(layout.tokens)
    end = layout.before + layout.grid_tokens
    kept = (token < layout.before + lead * layout.grid[1] * layout.grid[2]) | (token >= end)
    return Gather(layout, (t, h, w), token[kept].to(device), lead)


def _density(layout: TokenLayout, axes: tuple[Axis, Axis, Axis], lead: int) -> float:
    """Kept share of all pairs: windows, leading frames, and text with everything."""
    t, h, w = axes
    place = torch.empty(t.size, dtype=torch.int64)
    place[t.coordinate] = torch.arange(t.size)
    leading = ((t.low[:, None] <= place[:lead]) & (place[:lead] < t.high[:, None])).sum()
    plane = layout.grid[1] * layout.grid[2]
    windows = (t.pairs - int(leading)) * h.pairs * w.pairs
    grid = windows + layout.grid[0] * lead * plane**2
    return 1 - (layout.grid_tokens**2 - grid) / layout.tokens**2


def aligned_stride(window: int, tile: int) -> int:
    """A stride with which windows begin where tiles do, if there is one."""
    for stride in (tile, 2 * tile):
        if stride <= window and (stride // 2 - window // 2) % tile == 0:
            return stride
    return min(tile, window)


def fit_window(
    grid: Grid, tile: Grid, share: float, limits: tuple[int, ...], stride: Grid | None
) -> Grid:
    """The window of whole tiles nearest to `share` of the grid, as even over the axes as can be."""
    options = []
    for i, size in enumerate(grid):
        least = 1 if stride is None else min(stride[i], limits[i])
        whole = [n for n in range(tile[i], limits[i], tile[i]) if n >= least]
        options.append([*whole, limits[i]] if size > 1 else [1])

    def cost(window: tuple[int, ...]) -> float:
        parts = [math.log(k / n) for k, n in zip(window, grid, strict=True) if n > 1] or [0.0]
        return abs(sum(parts) - math.log(max(share, 1e-9))) + 0.1 * (max(parts) - min(parts))

    t, h, w = min(itertools.product(*options), key=cost)
    return t, h, w


def _possible(n: int | float, knob: str) -> bool:
    if isinstance(n, float):
        return knob == "window" and 0 < n <= 1
    return isinstance(n, int) and n >= 1


def _fits(ok: bool, knob: str, value: int, name: str, grid: Grid, accepted: str) -> None:
    if not ok:
        where = f"on axis {name!r} of the grid {tuple(grid)} (frames, height, width)"
        raise ValueError(f"{knob}={value} is not possible {where}: accepted is {accepted}")
