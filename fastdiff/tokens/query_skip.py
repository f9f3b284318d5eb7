"""QuerySkip: queries whose attention did little the last time look at pooled keys only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.attention import Layer, Selection
from fastdiff.blockmask import BlockMask
from fastdiff.clock import StepClock
from fastdiff.kernels.block_pool import block_pool
from fastdiff.layout import Tiling, TokenLayout
from fastdiff.method import Host, Method, check
from fastdiff.seam import LAYER, attention_modules, crossing
from fastdiff.tokens.entry import Entry, Site, check_steps, sites, wants_gradients
from fastdiff.tokens.kv_downsample import downsample
from fastdiff.tokens.rank import best
from fastdiff.tokens.skip_state import Skips, choose_queries, note_output


@dataclass(frozen=True, kw_only=True)
class QuerySkip(Method):
    """Per layer, the queries with the smallest attention output skip exact attention.

    Every `refresh` steps all queries attend and each layer notes how large its output is for every
    token. In the steps between, the tokens with the largest attend as before; the others look at
    pooled keys only, or at nothing and keep their residual. Every layer decides for itself, so a
    token that is skipped in one is reconsidered in the next, and keys and values are always made
    from all tokens: nothing goes stale.

    keep: fraction of the picture's queries that attend, over (0, 1]. Text queries always do.
    skipped: what skipped queries look at: "pooled" keys, or "nothing".
    factor: side of a pooled cell, in tokens; beside block-sparse attention its tiles are the cells.
    refresh: every so many steps all queries attend.
    dense_steps: first steps in which all queries attend; an int counts steps, a float is a
        fraction of them.
    min_tokens: shorter sequences are left alone.

    Beside a block-sparse attention method whole tiles of queries are skipped, in its own kernel,
    and "pooled" is its tail (with tail=False there is nothing to look at). Methods that compute
    attention themselves are left alone, which the report says. Cost: one pass over the output in
    refresh steps. Without a scheduler there are no steps, and every call is a refresh. Source:
    after Token Sparse Attention (arXiv 2602.03216): per layer, with the residual kept; ours: the
    choice by the size of the last output, queries alone (not keys and values), pooled keys.
    """

    name: ClassVar[str] = "query-skip"
    summary: ClassVar[str] = "transformers: queries that matter little look at pooled keys only"
    kind: ClassVar[str] = "tokens"

    keep: float = 0.5
    skipped: str = "pooled"
    factor: int = 8
    refresh: int = 4
    dense_steps: int | float = 0.2
    min_tokens: int = 8192

    def __post_init__(self) -> None:
        check(0 < self.keep <= 1, "keep", self.keep, "a number over 0, at most 1")
        check(self.skipped in ("pooled", "nothing"), "skipped", self.skipped, "pooled, nothing")
        check(self.factor >= 2, "factor", self.factor, "2 or more tokens")
        check(self.refresh >= 1, "refresh", self.refresh, "1 or more steps")
        check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        check_steps("dense_steps", self.dense_steps)

    def attach(self, host: Host) -> Callable[[], None]:
        entry, turn = Entry(), Turn(host.clock, self)
        if host.pipe is None:
            host.fallback(self.name, "a bare model has no steps, so every query attends in every "
                          "call; pass the scheduler, too (docs/seam.md)")
        try:
            for name, part in host.models.items():
                if part.family.site is not None:
                    raise ValueError(f"{self.name} is for diffusion transformers, and {name} is a "
                                     f"{type(part.model).__name__}: use at-edm there")
                entry.claim(part.model, self.name, ())
                site = next(iter(sites(name, part).values()))
                entry.before(part.model, site.hook())
                stages: dict[str, Any] = {}
                for path, module in attention_modules(part.model):
                    if any(skip in path for skip in part.family.skip):
                        continue
                    layer = getattr(module, LAYER, None)
                    if layer is None:
                        stages[path] = _Queries(self, host, site, turn, f"{name}.{path}")
                    else:
                        self._check_tail(layer)
                        layer.skip = _Tiles(self, host, turn, layer)
                        entry.on_leave(lambda layer=layer: setattr(layer, "skip", None))
                entry.stages(part.model, host.clock, stages, outermost=True)
        except BaseException:
            entry.leave()
            raise
        return entry.leave

    def _check_tail(self, layer: Layer) -> None:
        if self.skipped == "nothing" and layer.session.policy.tail:
            raise ValueError("skipped='nothing' beside an attention method that pools its skipped "
                             "tiles: pass tail=False there, or skipped='pooled' here")


class Turn:
    """Whether all queries attend in this step; kept outside of traced code by the clock."""

    def __init__(self, clock: StepClock, method: QuerySkip) -> None:
        self.whole = True
        self._clock = clock
        self._method = method
        clock.on_begin(self._look)
        clock.on_advance(self._look)

    def __deepcopy__(self, memo: dict) -> "Turn":
        return self

    def _look(self) -> None:
        clock, first = self._clock, self._method.dense_steps
        if isinstance(first, float):
            first = round(first * clock.steps)
        # the last dense step is the first refresh
        since = 0 if clock.step is None else clock.step - max(0, first - 1)
        self.whole = since <= 0 or since % self._method.refresh == 0


class _Queries:
    """The stage of one attention module whose attention is stock."""

    def __init__(
        self, method: QuerySkip, host: Host, site: Site, turn: Turn, name: str
    ) -> None:
        self.method = method
        self.site = site
        self.name = name
        self.state = Skips(host.clock)
        self._turn = turn
        self._report = host.report
        self._fallback = host.fallback

    def __deepcopy__(self, memo: dict) -> "_Queries":
        return self

    def __call__(self, attend, query, key, value, mask, scale):
        method, tokens = self.method, query.shape[1]
        whole = self.site.layout
        layout = None if whole is None else whole.matching(tokens)
        count = 0 if layout is None else max(1, round(method.keep * layout.grid_tokens))
        if (layout is None or crossing(key.shape[1]) or layout.grid_tokens < method.min_tokens
                or count == layout.grid_tokens):
            return attend(query, key, value, mask)
        problem = None
        if mask is not None:
            problem = "an attention mask"
        elif wants_gradients(query, key, value):
            problem = "gradients are wanted, and the choice of queries has none"
        if problem is not None:
            self._stock(problem)
            return attend(query, key, value, mask)
        if self._turn.whole:
            self._count("calls with every query")
            return note_output(attend(query, key, value, None), self.state.number)
        self._count("calls with fewer queries")
        return self._fewer(attend, query, key, value, layout, count)

    def _fewer(self, attend, query, key, value, layout: TokenLayout, count: int) -> Tensor:
        text = layout.before + layout.after
        kept, rest = choose_queries(query, self.state.number, layout.before, layout.after,
                                    count + text)
        out = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        out = _put(out, kept, attend(_take(query, kept), key, value, None))
        if self.method.skipped == "nothing":
            return out
        pooled = downsample(key, value, None, layout, self.method.factor, "mean", True)
        return _put(out, rest, attend(_take(query, rest), *pooled))

    def _count(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            self._report.count(self.method.name, what)

    def _stock(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self._fallback(f"{self.method.name} in {self.name}", reason)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, S, H, D]."""
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))


def _put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return x.scatter(1, index[..., None, None].expand_as(rows), rows)


class _Tiles:
    """Beside block-sparse attention: called by its op, inside of which nothing is traced."""

    def __init__(self, method: QuerySkip, host: Host, turn: Turn, layer: Layer) -> None:
        self.method = method
        self._report = host.report
        self._turn = turn
        self._layer = layer.name
        self._sizes: dict[Any, Tensor] = {}
        host.clock.on_begin(self._sizes.clear)

    def fewer(self, chosen: Selection, tiles: Tiling, branch: Any, tokens: int) -> Selection:
        """The selection without the rows of skipped query tiles."""
        sizes = self._sizes.get(branch)
        keep = chosen.mask.keep
        if (self._turn.whole or tokens < self.method.min_tokens or sizes is None
                or sizes.shape != (keep.shape[0], keep.shape[2])):
            return chosen
        must = tiles.dense_rows.to(keep.device)
        free = tiles.blocks - len(tiles.text_blocks)
        count = keep.shape[2] - free + max(1, round(self.method.keep * free))
        attends = torch.zeros_like(sizes, dtype=torch.bool)
        attends.scatter_(1, best(sizes.masked_fill(must, torch.inf), count), True)
        kept = keep & attends[:, None, :, None]
        mask = BlockMask(kept, chosen.mask.offsets, chosen.mask.block)
        counts = chosen.counts * attends[:, None, :]
        self._report.count(self.method.name, "calls with fewer tiles of queries")
        return Selection(mask, chosen.indices, counts, mask.density(), chosen.order)

    def note(self, output: Tensor, tiles: Tiling, branch: Any) -> None:
        """How large the output [B, S, H, D], in tile order, is for each tile of queries."""
        if self._turn.whole:
            size = output.flatten(2).norm(dim=-1, dtype=torch.float32)[..., None, None]
            mean, _ = block_pool(size, tiles.offsets, block=tiles.block)
            self._sizes[branch] = mean[:, 0, :, 0]

    def left_alone(self) -> None:
        self._report.tell(self.method.name, "left alone", "the attention method has no tiles")
