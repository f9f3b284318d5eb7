"""SparseVDiT: a fixed pattern for every head, layer and range of steps, found by a search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.layout import Grid, Tiling, TokenLayout, auto_tile, tiling
from fastdiff.method import Host
from fastdiff.method import check as _check
from fastdiff.policies.base import Context, Policy
from fastdiff.policies.modes import FULL, MODES, STRIPES, Patterns, from_bits, mode_mask, patterns

_NO_TABLE = (
    "sparse-vdit needs the table of a search and has no sensible default: run `fastdiff calibrate "
    "--method sparse-vdit -o plan.json` once for this model and size, then enable_fastdiff("
    "plan=\"plan.json\"); or give every head a mode by hand, such as modes=\"dmv\""
)


@dataclass(frozen=True, kw_only=True)
class SparseVDiT(Policy):
    """Sparse-vDiT (arXiv 2506.03065): each head has one of five static modes.

    f full; s skip: the head's output is zero and nothing is computed; d diagonal: a band over
    blocks numbered frame by frame, so near frames; m multi-diagonal: the same band over blocks
    numbered by their place in the frame first, so near places in all frames; v vertical stripes:
    one set of key blocks for all queries. Text keys, text queries and the first `sink` frames are
    kept in d, m and v.

    `fastdiff calibrate --method sparse-vdit` finds the modes for a model, size, number of steps
    and scheduler; the plan it writes holds them in `calibration`. Without a table this method
    refuses to run, unless density is 1.

    width: density of a head with mode d, m or v; None is half of `density`, so that the search can
        leave heads full, and all of `density` where `modes` is given.
    modes: letters dealt to the heads in turn, the same in every layer and step, such as "dmv"; for
        experiments and timing.

    Order of tokens: tiles that lie in one frame, numbered frame by frame. Both bands and the
    stripes are then exact lists of whole blocks, so all heads run in one launch with no copy by
    mode. The paper's raster blocks would straddle rows and frames, and its multi-diagonal needs
    tokens reordered.
    Cost: no selection at all; lists are looked up. Limits: the patterns cannot react to the prompt
    or to a LoRA, and mass outside them is dropped (`tail` is off unless asked for; with it a
    skipped head attends to block means). The paper names neither band widths nor stripes: ours
    come from `width` and from measured attention mass.
    """

    name: ClassVar[str] = "sparse-vdit"
    summary: ClassVar[str] = "a searched static pattern for each head; needs `fastdiff calibrate`"

    tail: bool = False
    width: float | None = None
    modes: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.width is None or 0 < self.width <= 1, "width", self.width,
               "a number over 0, at most 1")
        _check(self.modes is None or (len(self.modes) > 0 and {*self.modes} <= {*MODES}), "modes",
               self.modes, f"letters out of {MODES}, such as \"dmv\"")
        _check(self.tile is None or self.tile[0] == 1, "tile", self.tile,
               "a tile within one frame: (1, height, width)")

    def attach(self, host: Host) -> Callable[[], None]:
        if self.density < 1 and self.modes is None and not self._searched:
            raise ValueError(_NO_TABLE)
        return super().attach(host)

    @property
    def band(self) -> float:
        """Density of a head that is neither full nor skipped."""
        if self.width is not None:
            return self.width
        return self.density if self.modes is not None else self.density / 2

    def tiles(self, layout: TokenLayout, query: Tensor, context: Context) -> Tiling:
        return tiling(layout, self.tile_of(layout, query.is_cuda), 0, query.device)

    def tile_of(self, layout: TokenLayout, gpu: bool) -> Grid:
        """Tiles of 64 tokens within a frame, of 128 on a GPU for long sequences."""
        size = 128 if gpu and layout.tokens >= 8192 else 64
        return self.tile or auto_tile((1, *layout.grid[1:]), size)

    def patterns(self, layout: TokenLayout, tile: Grid, device: torch.device) -> Patterns:
        """What each mode keeps in this layout."""
        sink = self.sink
        if sink is None:
            # where one frame takes at most a quarter of a head's budget
            sink = int(layout.grid[0] * self.band >= 4)
        return patterns(layout, tile, sink, self.band, device)

    @property
    def uneven(self) -> bool:
        return True

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        modes = self.modes_of(context, query.shape[2])
        if {*modes} == {FULL}:
            return None
        tile = self.tile_of(context.layout, query.is_cuda)
        found = self.patterns(context.layout, tile, query.device)
        stripes = tuple(self._stripes(found, context.layer, head)
                        for head, mode in enumerate(modes) if mode == STRIPES)
        return mode_mask(modes, stripes, found, query.shape[0])

    def modes_of(self, context: Context, heads: int) -> str:
        """A letter for each head of this layer in this step."""
        if self.density == 1:
            return FULL * heads
        if self.modes is not None:
            return (self.modes * heads)[:heads]
        if self.calibration is None or self.calibration.modes is None:
            raise ValueError(_NO_TABLE)
        self.calibration.layer(context.layer, heads, context.layout.grid)
        return self.calibration.modes[self.calibration.range_of(context.clock)][context.layer]

    @property
    def _searched(self) -> bool:
        return self.calibration is not None and self.calibration.modes is not None

    def _stripes(self, found: Patterns, layer: int, head: int) -> Tensor:
        known = (self.calibration.stripes or {}) if self.calibration is not None else {}
        bits = known.get(str(layer), {}).get(str(head))
        if bits is None:
            return found.even
        return found.of_grid(from_bits(bits, found.grid_blocks, found.keep.device))
