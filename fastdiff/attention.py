"""The one op behind the seam: look up the layer's policy, select, call the kernel or stay dense."""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.clock import StepClock
from fastdiff.kernels.block_sparse_attention import (
    AUTO,
    block_sparse_attention,
    implementations,
    refused,
)
from fastdiff.kernels.block_sparse_attention import chosen as chosen_kernel
from fastdiff.kernels.tile_gather import tile_gather
from fastdiff.kernels.token_permute import permute_tokens
from fastdiff.layout import Tiling, TokenLayout
from fastdiff.policies.base import Context, Policy, Terms
from fastdiff.policies.row_order import row_order
from fastdiff.report import LayerReport, Report

logger = logging.getLogger("fastdiff")


class DenseFallbackError(RuntimeError):
    """Strict mode: attention would have run dense for a reason the user did not ask for."""


class Selection(NamedTuple):
    """What a policy chose, in the forms that the kernel and the report need."""

    mask: BlockMask
    indices: Tensor
    counts: Tensor
    density: Tensor
    order: Tensor | None = None


@dataclass
class Session:
    """Everything that one `enable` call switched on."""

    chosen: Policy | None
    clock: StepClock
    strict: bool = False
    impl: str = "auto"
    report: Report = field(default_factory=Report)
    watch: Callable[[], None] = lambda: None  # noqa: E731 - called before each call's step is read
    _warned: set[str] = field(default_factory=set)
    _order: int = 0

    @property
    def policy(self) -> Policy:
        """The attention method; a layer exists only where there is one."""
        assert self.chosen is not None
        return self.chosen

    def next_index(self) -> int:
        self._order += 1
        return self._order - 1

    def stays_stock(self, where: str, reason: str) -> None:
        """Count something that a method leaves stock unasked; raise in strict mode, else log."""
        if self.strict:
            raise DenseFallbackError(
                f"{where} would run stock: {reason}. Strict mode is on; pass strict=False (or "
                "unset FASTDIFF_STRICT) to let it run stock.")
        self.report.stock[f"{where}: {reason}"] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs stock: %s (further cases are only counted)", where, reason)

    def fallback(self, layer: "Layer", reason: str, flops: float = 0.0) -> None:
        """Count a dense call that the user did not ask for; raise in strict mode, else log once."""
        if self.strict:
            raise DenseFallbackError(
                f"{layer.name}: attention would run dense: {reason}. Strict mode is on; pass "
                "strict=False (or unset FASTDIFF_STRICT) to let such calls run dense."
            )
        layer.stats(self).dense(reason, flops, fallback=True)
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs dense: %s (further calls are only counted)", layer.name, reason)


_numbers = itertools.count(1)
LAYERS: WeakValueDictionary[int, "Layer"] = WeakValueDictionary()


class Layer:
    """One attention module that FastDiff drives.

    number: 0-dim CPU tensor, the same object for the layer's life. A tensor, not an int: a compiled
    graph is then shared by all layers of a model.
    """

    def __init__(self, name: str, denoiser: Any, session: Session) -> None:
        number = next(_numbers)
        self.name = name
        self.denoiser = denoiser
        self.session = session
        self.number = torch.tensor(number, dtype=torch.int64)
        self.index = -1
        self.slot = len(session.report.layers)
        self.masks: dict[Any, tuple[int, Selection]] = {}
        # a token method that lets tiles of queries skip: fewer, note, left_alone (query_skip.py)
        self.skip: Any = None
        self._seen: tuple[int, int | None] | None = None
        self._call = 0
        session.report.layers.append(LayerReport(name))
        LAYERS[number] = self

    def __deepcopy__(self, memo: dict) -> "Layer":
        # a copied model goes on under the same session
        return self

    def stats(self, session: Session) -> LayerReport:
        report = session.report.layers[self.slot]
        if self.index < 0:
            self.index = session.next_index()
        report.index = self.index
        report.policy = session.policy.name
        return report

    def branch(self, clock: StepClock) -> Any:
        """Guidance branch: the pipeline's name for it, else the number of the call in this step."""
        now = (clock.run, clock.step)
        self._call = self._call + 1 if self._seen == now else 0
        if self._seen is not None and self._seen[0] != clock.run:
            self.masks.clear()
        self._seen = now
        return self._call if clock.branch is None else clock.branch


# dense attention by backend key: "sdpa", or what the seam registers
Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None, str], Tensor]


def dense_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, _: str
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, **({"enable_gqa": True} if gqa else {})
    ).transpose(1, 2)


dense_attention: dict[str, Dense] = {"sdpa": dense_sdpa}


@torch.library.custom_op("fastdiff::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],  # noqa: UP045 - torch 2.6 reads the schema from these names
    ids: Optional[Tensor],  # noqa: UP045
    layer: Tensor,
    layout: Sequence[int],
    scale: Optional[float],  # noqa: UP045
    backend: str,
) -> Tensor:
    """Attention of one layer. query, key, value and result: [B, S, H, D].

    layer: the number of the `Layer`. layout: frames, height, width, before, after.
    ids: positions [S_grid, axes] where only they know the grid (Flux), else None.
    backend: key into `dense_attention` and, after a colon, an argument for it.
    """
    return attend(query, key, value, mask, ids, layer, layout, scale, backend).contiguous()


@attention.register_fake
def _(query, key, value, mask, ids, layer, layout, scale, backend):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ids: Tensor | None,
    layer: Tensor, layout: Sequence[int], scale: float | None, backend: str,
) -> Tensor:
    """The body of the op, in plain torch and differentiable; the same arguments."""
    armed = LAYERS[int(layer)]
    grid, before, after = layout[:3], layout[3], layout[4]
    if ids is not None:
        grid = armed.denoiser.grid_from_ids(ids)
    tokens = TokenLayout((grid[0], grid[1], grid[2]), before, after)
    call = _Call(armed, query, key, value, mask, scale, backend)
    if not torch.is_autocast_enabled(query.device.type):
        return call.run(tokens)
    # the seam has cast already, and kernels choose their own precision
    with torch.autocast(query.device.type, enabled=False):
        return call.run(tokens)


@dataclass
class _Call:
    layer: Layer
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    backend: str

    @property
    def flops(self) -> float:
        b, s, h, d = self.query.shape
        return 4.0 * b * h * s * self.key.shape[1] * d

    @property
    def trains(self) -> bool:
        wanted = any(x.requires_grad for x in (self.query, self.key, self.value))
        return wanted and torch.is_grad_enabled()

    def dense(self) -> Tensor:
        kind, _, argument = self.backend.partition(":")
        return dense_attention[kind](
            self.query, self.key, self.value, self.mask, self.scale, argument
        )

    def run(self, layout: TokenLayout) -> Tensor:
        session, layer = self.layer.session, self.layer
        session.watch()
        stats = layer.stats(session)
        branch = layer.branch(session.clock)
        context = Context(layout, session.clock, layer.index, _seed(session, layer.index))
        key_mask, problem = _key_mask(self.mask, self.query.shape[0], self.key.shape[1])
        problem = problem or self._unsupported()
        if problem is not None:
            session.fallback(layer, problem, self.flops)
            return self.dense()
        policy = session.policy.at(context)
        why = policy.stays_dense(layout, self.query.device.type, context)
        if why is None:
            with _timed(stats, self.query):
                out = self._sparse(policy, layout, context, branch, key_mask)
            if out is not None:
                return out
            why = "the method chose dense"
        stats.dense(why, self.flops, fallback=False)
        with _timed(stats, self.query):
            return self.dense()

    def _unsupported(self) -> str | None:
        query = self.query
        usable = implementations(query.device, query.dtype, query.shape[-1])
        impl = self.layer.session.impl
        names = [impl] if impl != "auto" else [n for n in usable if n != "reference"]
        if any(not usable[name] for name in names):
            return None
        return "; ".join(f"{name}: {', '.join(usable[name])}" for name in names)

    def _sparse(
        self, policy: Policy, layout: TokenLayout, context: Context, branch: Any,
        key_mask: Tensor | None,
    ) -> Tensor | None:
        session = self.layer.session
        terms = Terms(key_mask, self.scale, session.impl)
        attended = policy.attend(self.query, self.key, self.value, context, terms)
        if attended is not None:
            if self.layer.skip is not None:
                self.layer.skip.left_alone()
            if self.trains and not attended.output.requires_grad:
                reason = f"gradients are wanted, and {policy.name} computes attention without them"
                session.fallback(self.layer, reason, self.flops)
                return self.dense()
            ran = attended.implementation or "blocks"
            if attended.reason is not None:
                session.report.explain(policy.name, f"{ran} because", attended.reason)
            self._count(attended.density, ran)
            return attended.output
        tiles = policy.tiles(layout, self.query, context)
        gathered = tile_gather(
            self.query, self.key, self.value, tiles.order, tiles.offsets, block=tiles.block,
            mask=key_mask)
        q, k, v = gathered[:3]
        context = replace(context, key_mean=gathered.key_mean)
        chosen = self._selection(policy, q, k, tiles, layout, context, branch)
        if chosen is None:
            return None
        skip = self.layer.skip
        if skip is not None:
            chosen = skip.fewer(chosen, tiles, branch, layout.tokens)
        if key_mask is not None:
            key_mask = key_mask[:, tiles.order]
        tail = None
        if policy.tail:
            tail = (*gathered[3:], chosen.mask.keep)
        impl = self._kernel(policy, q, k, v, tiles, key_mask, tail)
        out = block_sparse_attention(
            q, k, v, chosen.indices, chosen.counts, tiles.offsets, tiles.offsets,
            block_q=tiles.block, block_k=tiles.block,
            key_mask=key_mask, tail=tail, scale=self.scale, order=chosen.order, impl=impl,
        )
        if skip is not None:
            skip.note(cast(Tensor, out), tiles, branch)
        tail_flops = self.flops * tiles.blocks / layout.tokens if policy.tail else 0.0
        self._count(chosen.density, impl, tail_flops)
        return permute_tokens(cast(Tensor, out), tiles.inverse)

    def _kernel(
        self, policy: Policy, q: Tensor, k: Tensor, v: Tensor, tiles: Tiling,
        key_mask: Tensor | None, tail: Any,
    ) -> str:
        """The block-sparse kernel of this call; the report says why not the one wanted most."""
        session = self.layer.session
        terms = {"block_q": tiles.block, "block_k": tiles.block, "key_mask": key_mask,
                 "tail": tail}
        impl = chosen_kernel(q, k, v, impl=session.impl, **terms)
        new = self.layer.stats(session).implementation != impl
        if new and session.impl == "auto" and q.is_cuda and impl != AUTO[0]:
            reasons = refused(AUTO[0], q, k, v, **terms)
            session.report.tell(policy.name, f"{impl}, not {AUTO[0]}, because", ", ".join(reasons))
        return impl

    def _count(self, density: Tensor, implementation: str, tail_flops: float = 0.0) -> None:
        stats = self.layer.stats(self.layer.session)
        stats.implementation = implementation
        stats.sparse(density, self.flops, tail_flops)

    def _selection(
        self, policy: Policy, q: Tensor, k: Tensor, tiles: Tiling, layout: TokenLayout,
        context: Context, branch: Any,
    ) -> Selection | None:
        step = context.clock.step
        place = (branch, layout, tuple(q.shape))
        if policy.reuse > 1 and step is not None and place in self.layer.masks:
            made, selection = self.layer.masks[place]
            if 0 <= step - made < policy.reuse:
                return selection
        with torch.no_grad():
            mask = policy.select(q, k, tiles, context)
        if mask is None:
            return None
        indices, counts = mask.lists()
        selection = Selection(mask, indices, counts, mask.density(),
                              row_order(counts, tiles, policy.density, policy.uneven))
        if policy.reuse > 1 and step is not None:
            self.layer.masks[place] = (step, selection)
        return selection


def _seed(session: Session, index: int) -> int:
    return (session.policy.seed * 1_000_003 + index) * 1_000_003 + (session.clock.step or 0)


def _key_mask(mask: Tensor | None, batch: int, keys: int) -> tuple[Tensor | None, str | None]:
    """Read a key-padding mask, bool [B, S]; or say why the mask is none."""
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        if mask.dim() == 2 and mask.shape == (batch, keys):
            return mask, None
        if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
            return mask[:, 0, 0, :].expand(batch, keys), None
    return None, f"an attention mask of shape {tuple(mask.shape)} and dtype {mask.dtype}"


@contextmanager
def _timed(stats: LayerReport, query: Tensor):
    if not query.is_cuda:
        begin = time.perf_counter()
        yield
        stats.timed(time.perf_counter() - begin)
        return
    if torch.cuda.is_current_stream_capturing():
        yield
        return
    begin_event = torch.cuda.Event(enable_timing=True)
    end_event = torch.cuda.Event(enable_timing=True)
    begin_event.record()
    yield
    end_event.record()
    stats.timed((begin_event, end_event))
