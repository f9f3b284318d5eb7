"""VMoBA: each query takes the chunks whose mean key it likes best; the chunks change by layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.block_sparse_attention import chosen
from fastdiff.kernels.token_permute import permute_tokens
from fastdiff.layout import Tiling, TokenLayout
from fastdiff.method import check
from fastdiff.policies.base import Attended, Context, Policy, Terms
from fastdiff.policies.chunks import Chunks, auto_box, chunk_means, chunks_of
from fastdiff.policies.partition import block_size, grid_density
from fastdiff.policies.routed import routed_attention
from fastdiff.policies.routes import (
    GROUPS,
    own_chunk,
    route_threshold,
    route_top_k,
    tau_for_density,
)

FORMS = ("exact", "tiles")
SELECT = ("top-k", "threshold")
# scores held at a time, where heads can be taken one after the other
GATES = 1 << 26
# the paper's training-free settings (Table 4): 81 frames of 480x832 and of 720x1280
PRESETS: dict[str, dict[str, Any]] = {
    "wan-480p": {"frames_chunk": 3, "plane_chunk": (5, 13), "box_chunk": (7, 5, 13),
                 "top_k": (2, 6, 18)},
    "wan-720p": {"frames_chunk": 3, "plane_chunk": (9, 10), "box_chunk": (7, 15, 20),
                 "top_k": (2, 10, 9)},
}


@dataclass(frozen=True, kw_only=True)
class VMoBA(Policy):
    """Video mixture of block attention, without training.

    The layers take turns in cutting the grid along one, two or three axes. Each token of each head
    scores the mean key of every chunk and attends to the best ones, always to its own chunk, and to
    text. Text queries see everything; text takes no part in the scores.

    form: "exact" routes every token by itself, as the paper does. "tiles" lets a tile of queries
        choose by its mean query: another algorithm, faster, with the pooled tail where asked for.
    cycle: layers in turn that cut one axis (runs of frames), two (all frames of a spatial cell) and
        three; counted from the first layer that is not dense.
    frames_chunk: frames of a one-axis chunk; a fraction cuts runs of tokens. None: about 7 chunks.
    plane_chunk: (height, width) tokens of a two-axis chunk. None: about 30 chunks.
    box_chunk: (frames, height, width) of a three-axis chunk. None: about 72 chunks.
    select_by: "top-k" or "threshold".
    group: what shares a budget: each "query", "block" (all queries of a chunk), "head", or
        "overall". A sample of a batch never shares with another.
    top_k: chunks a query takes, on average over its group, in layers that cut one, two and three
        axes. None: as many as meet `density`.
    include_self_in_k: whether top_k counts the own chunk, as the authors' code does; their
        published operation counts for 480p fit "no".
    tau: share of min-max normalised similarity that "threshold" keeps; the paper trains with 0.25.
        None: found for each sample to meet `density`. 1 or more is dense.
    preset: "wan-480p" or "wan-720p", the paper's training-free settings; fills options left None.

    Source: arXiv 2506.23858. The paper trains with group="head" and select_by="threshold", and runs
    untrained models with the defaults here. Cost of "exact": tokens * chunks scores, and one copy
    of the queries for each chunk they take; a group other than "query" and a threshold read two
    numbers from the device at each call. Gradients pass through attention, not through the choice,
    as in the paper. Limits: made for training; without it the paper reports 16
    to 19 dB PSNR on Wan. docs/vmoba.md tells what differs from the authors' code.
    """

    name: ClassVar[str] = "vmoba"
    summary: ClassVar[str] = "VMoBA: queries take the chunks with the best mean key"

    dense_steps: int | float = 0.25
    tail: bool = False
    sink: int | None = 0
    form: str = "exact"
    cycle: tuple[int, int, int] = (1, 1, 1)
    frames_chunk: int | float | None = None
    plane_chunk: tuple[int, int] | None = None
    box_chunk: tuple[int, int, int] | None = None
    select_by: str = "top-k"
    group: str = "query"
    top_k: tuple[int, int, int] | None = None
    include_self_in_k: bool = True
    tau: float | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob, accepted in (("form", FORMS), ("select_by", SELECT), ("group", tuple(GROUPS))):
            value = getattr(self, knob)
            check(value in accepted, knob, value, f"one of {', '.join(accepted)}")
        check(self.preset is None or self.preset in PRESETS, "preset", self.preset,
              f"one of {', '.join(PRESETS)}")
        for knob, value in PRESETS.get(self.preset or "", {}).items():
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, value)
        self._whole("cycle", 3, 0, "three numbers of layers, 0 or more, one of them over 0")
        check(sum(self.cycle) > 0, "cycle", self.cycle, "three numbers of layers, not all 0")
        self._whole("plane_chunk", 2, 1, "(height, width) in tokens, 1 or more each")
        self._whole("box_chunk", 3, 1, "(frames, height, width) in tokens, 1 or more each")
        least = 1 if self.include_self_in_k else 0
        self._whole("top_k", 3, least, f"three numbers of chunks, {least} or more each")
        check(self.frames_chunk is None or self.frames_chunk > 0, "frames_chunk",
              self.frames_chunk, "a number of frames over 0; a fraction is possible")
        check(self.tau is None or self.tau >= 0, "tau", self.tau, "a share, 0 or more")
        check(not self.sink, "sink", self.sink, "0: chunks are chosen as a whole")
        if self.form == "exact":
            check(not self.tail, "tail", self.tail, "False with form='exact'; form='tiles' has it")
            check(self.reuse == 1, "reuse", self.reuse, "1 with form='exact'; form='tiles' reuses")

    def _whole(self, knob: str, length: int, least: int, accepted: str) -> None:
        value = getattr(self, knob)
        if value is None:
            return
        numbers = tuple(value) if isinstance(value, (tuple, list)) else ()
        check(len(numbers) == length and all(isinstance(n, int) and n >= least for n in numbers),
              knob, value, accepted)
        object.__setattr__(self, knob, numbers)

    def axes(self, layer: int) -> int:
        """How many axes this layer cuts: 1, 2 or 3."""
        one, two, three = self.cycle
        turn = max(0, layer - self.dense_layers) % (one + two + three)
        return 1 if turn < one else 2 if turn < one + two else 3

    def chunks(self, layout: TokenLayout, query: Tensor, layer: int) -> Chunks:
        """The chunks of this layer, and their blocks in tile order."""
        axes, grid = self.axes(layer), layout.grid
        box = auto_box(grid, axes)
        if axes == 1 and self.frames_chunk is not None:
            box = (self.frames_chunk, grid[1], grid[2])
        elif axes == 2 and self.plane_chunk is not None:
            box = (grid[0], *self.plane_chunk)
        elif axes == 3 and self.box_chunk is not None:
            box = self.box_chunk
        return chunks_of(layout, box, self.tile, block_size(layout, query), query.device)

    def tiles(self, layout: TokenLayout, query: Tensor, context: Context) -> Tiling:
        return self.chunks(layout, query, context.layer).tiles

    @property
    def uneven(self) -> bool:
        return True

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        """Chunks by the mean query of each tile; the blocks of a chunk are kept together."""
        chunks = self.chunks(context.layout, query, context.layer)
        grid = chunks.grid_blocks
        mean, _ = block_pool(query, tiles.offsets, block=tiles.block)
        gate = _gate(mean[:, :, grid], chunk_means(key, chunks))
        route, _ = self._route(gate, chunks.of_block, chunks, context)
        keep = chunks.own.keep.expand(*gate.shape[:2], -1, -1).clone()
        keep[:, :, grid, grid] |= route[..., chunks.of_block]
        return BlockMask(keep, tiles.offsets, tiles.block)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended | None:
        if self.form != "exact":
            return None
        chunks = self.chunks(context.layout, query, context.layer)
        order = chunks.tiles.order
        q, k, v = (permute_tokens(x, order) for x in (query, key, value))
        if terms.key_mask is not None:
            terms = terms._replace(key_mask=terms.key_mask[:, order])
        heads, groups = q.shape[2], q.shape[2] // k.shape[2]
        step = heads
        if self.group != "overall" and (self.select_by == "top-k" or self.tau is not None):
            # heads that share nothing need not be scored at once
            scores = q.shape[0] * context.layout.grid_tokens * len(chunks.lengths)
            step = max(1, GATES // scores // groups) * groups
        parts, pairs = [], []
        for begin in range(0, heads, step):
            kv = slice(begin // groups, (begin + step) // groups)
            part, kept = self._exact(
                q[:, :, begin : begin + step], k[:, :, kv], v[:, :, kv], chunks, context, terms)
            parts.append(part)
            pairs.append(kept)
        out = permute_tokens(torch.cat(parts, 2), chunks.tiles.inverse)
        routed = torch.cat(pairs).mean() / context.layout.tokens**2
        block = chunks.tiles.block
        kernel = chosen(q, k, v, block_q=block, block_k=block, key_mask=terms.key_mask,
                        impl=terms.impl)
        return Attended(out, chunks.own.pairs + routed, kernel)

    def _exact(
        self, query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, context: Context,
        terms: Terms,
    ) -> tuple[Tensor, Tensor]:
        """Output in tile order, and the routed pairs of each head, float32 [H]."""
        with torch.no_grad():
            gate = _gate(query[:, chunks.grid].transpose(1, 2), chunk_means(key, chunks))
            route, others = self._route(gate, chunks.of_token, chunks, context)
            del gate
            pairs = route.sum(2).float().mean(0) @ chunks.sizes
        return routed_attention(query, key, value, chunks, route, terms, others), pairs

    def _route(
        self, gate: Tensor, of_query: Tensor, chunks: Chunks, context: Context
    ) -> tuple[Tensor, int | None]:
        """Chosen chunks besides the own one, bool [B, H, S, C]; how many, where all are alike."""
        count = gate.shape[-1]
        own = own_chunk(of_query, count)
        density = grid_density(context.layout, self.density)
        if self.select_by == "threshold":
            tau = self.tau
            if tau is None and density == 1:
                tau = 1.0
            if tau is None:
                tau = tau_for_density(gate, own, self.group, chunks.sizes, density)
            return route_threshold(gate, own, self.group, tau), None
        if self.top_k is None:
            others = max(0.0, density * count - 1)
        else:
            others = self.top_k[self.axes(context.layer) - 1] - int(self.include_self_in_k)
        route = route_top_k(gate, own, self.group, others)
        return route, min(round(others), count - 1) if self.group == "query" else None


def _gate(query: Tensor, mean: Tensor) -> Tensor:
    """Scores float32 [B, H, S, C] of query [B, H, S, D] against mean keys [B, Hk, C, D]."""
    mean = mean.repeat_interleave(query.shape[1] // mean.shape[1], dim=1)
    return query.float() @ mean.float().mT
