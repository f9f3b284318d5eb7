"""Probe: measure, inside real generations, what candidates would do to each head's output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.block_sparse_attention import block_sparse_attention
from fastdiff.kernels.token_permute import permute_tokens
from fastdiff.layout import TokenLayout, tiling
from fastdiff.policies.base import Attended, Context, Policy, Terms

# what a head may go on with besides a candidate
STOCK, NOTHING = -2, -1
# query rows of each call whose exact attention is added up for the stripes
ROWS = 64


@dataclass
class Ledger:
    """Sums of one or more generations, by (step, layer).

    error: squared error of each candidate and head, float64 [C, H]. energy: squared stock output,
    [H]. numbers: elements behind them. density: of each candidate and head, [C, H]. layers: heads
    and grid of each layer.
    """

    error: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    energy: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    numbers: dict[tuple[int, int], float] = field(default_factory=dict)
    density: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: dict[tuple[int, int], int] = field(default_factory=dict)
    layers: dict[int, list[int]] = field(default_factory=dict)

    def add(
        self, step: int, layer: int, shape: list[int], error: Tensor, energy: Tensor,
        numbers: float, density: Tensor, calls: int = 1,
    ) -> None:
        key = (step, layer)
        self.layers[layer] = shape
        self.error[key] = self.error.get(key, 0) + error
        self.energy[key] = self.energy.get(key, 0) + energy
        self.density[key] = self.density.get(key, 0) + density
        self.numbers[key] = self.numbers.get(key, 0) + numbers
        self.calls[key] = self.calls.get(key, 0) + calls

    def merge(self, other: "Ledger") -> None:
        for key in other.error:
            self.add(*key, other.layers[key[1]], other.error[key], other.energy[key],
                     other.numbers[key], other.density[key], other.calls[key])

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Probe(Policy):
    """Runs dense and every candidate beside it; adds up errors; goes on with what `follow` says.

    follow: (context, heads) -> for each head the number of a candidate, STOCK or NOTHING; None is
    stock for all.
    """

    candidates: tuple[Policy, ...] = ()
    ledger: Any = None
    follow: Callable[[Context, int], list[int]] | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended:
        stock = dense(query, key, value, terms)
        heads, wide = query.shape[2], stock.float()
        chosen = [STOCK] * heads if self.follow is None else self.follow(context, heads)
        out = stock.clone()
        errors, densities = [], []
        # one candidate at a time: at full size each output is large
        for number, policy in enumerate(self.candidates):
            found, density = sparse(policy, query, key, value, context, terms)
            errors.append(_by_head((found.float() - wide).square_()))
            densities.append(density)
            for head, choice in enumerate(chosen):
                if choice == number:
                    out[:, :, head] = found[:, :, head]
        for head, choice in enumerate(chosen):
            if choice == NOTHING:
                out[:, :, head] = 0
        energy = _by_head(wide.square())
        self.ledger.add(
            context.clock.step or 0, context.layer, [heads, *context.layout.grid],
            torch.stack(errors).double().cpu(), energy.double().cpu(), wide.numel() / heads,
            torch.stack(densities).double().cpu(),
        )
        one = torch.ones((), device=query.device)
        return Attended(out, one, "probe")


@dataclass(frozen=True, kw_only=True)
class MassProbe(Policy):
    """Runs dense, and adds up the attention mass that sampled queries give to each block of keys.

    base: the policy whose tiles count. mass: layer -> float64 [H, blocks of the grid]. seen: layer
    -> layout and tile.
    """

    base: Any = None
    mass: Any = None
    seen: Any = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended:
        stock = dense(query, key, value, terms)
        layout, tokens = context.layout, query.shape[1]
        tile = self.base.tile_of(layout, query.is_cuda)
        tiles = tiling(TokenLayout(layout.grid), tile, 0, query.device)
        rows = torch.linspace(0, tokens - 1, min(ROWS, tokens), dtype=torch.float64,
                              device=query.device)
        # other rows in each step, the same in a repeated search
        rows = (rows.long() + 7 * (context.clock.step or 0)) % tokens
        q, k = query[:, rows].transpose(1, 2).float(), key.transpose(1, 2).float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.mT * (terms.scale or query.shape[-1] ** -0.5)
        if terms.key_mask is not None:
            scores = scores.masked_fill(~terms.key_mask[:, None, None], -torch.inf)
        mass = scores.softmax(-1).mean((0, 2))[:, layout.before:layout.before + layout.grid_tokens]
        block = torch.arange(tiles.blocks, device=query.device)
        block = block.repeat_interleave(tiles.lengths.long())
        by_block = torch.zeros(mass.shape[0], tiles.blocks, device=query.device)
        by_block.index_add_(1, block, mass[:, tiles.order])
        self.seen[context.layer] = [*layout.grid, layout.before, layout.after, *tile]
        self.mass[context.layer] = self.mass.get(context.layer, 0) + by_block.double().cpu()
        return Attended(stock, torch.ones((), device=query.device), "probe")


def dense(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """Stock attention, [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if terms.key_mask is None else terms.key_mask[:, None, None]
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=terms.scale, **gqa)
    return out.transpose(1, 2)


def sparse(
    policy: Policy, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
) -> tuple[Tensor, Tensor]:
    """What `policy` would compute here, [B, S, H, D], and the density of each head, [H]."""
    attended = policy.attend(query, key, value, context, terms)
    if attended is not None:
        return attended.output, attended.density.expand(query.shape[2])
    tiles = policy.tiles(context.layout, query, context)
    q, k, v = (permute_tokens(x, tiles.order) for x in (query, key, value))
    mask = policy.select(q, k, tiles, context)
    if mask is None:
        return dense(query, key, value, terms), torch.ones(query.shape[2], device=query.device)
    key_mask = None if terms.key_mask is None else terms.key_mask[:, tiles.order]
    tail = None
    if policy.tail:
        key_mean, weight = block_pool(k, tiles.offsets, block=tiles.block, mask=key_mask)
        value_mean, _ = block_pool(v, tiles.offsets, block=tiles.block, mask=key_mask)
        tail = (key_mean, value_mean, weight, mask.keep)
    indices, counts = mask.lists()
    out = block_sparse_attention(
        q, k, v, indices, counts, tiles.offsets, tiles.offsets, block_q=tiles.block,
        block_k=tiles.block, key_mask=key_mask, tail=tail, scale=terms.scale, impl=terms.impl,
    )
    share = tiles.lengths / tiles.lengths.sum()
    density = ((mask.keep.float() @ share) @ share).mean(0)
    return permute_tokens(cast(Tensor, out), tiles.inverse), density


def _by_head(squares: Tensor) -> Tensor:
    return squares.sum((0, 1, 3))
