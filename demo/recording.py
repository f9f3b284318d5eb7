"""Recording: what a head attends to, and what methods would keep of it, layer by layer.

The run itself stays dense, so every method is asked about the same queries and keys.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.token_permute import permute_tokens
from fastdiff.layout import Tiling, TokenLayout
from fastdiff.policies import Context, Policy
from fastdiff.policies.base import Attended, Terms

MOST_BYTES = 96 * 2**20


@dataclass(frozen=True)
class Place:
    """One attention call as one method sees it, in that method's tiles.

    mass: float16 [H, N, N], share of attention that a tile of queries gives to a tile of keys;
    rows sum to 1. kept: float16 [H, N, N], share of its queries that attend to that tile.
    """

    layout: TokenLayout
    tiles: Tiling
    mass: Tensor
    kept: Tensor


@dataclass
class Recording:
    """All that was recorded in one run. Keys: (layer, step, method).

    refused: methods that could not choose, and why. full: recording ended early, for memory.
    frames: what the run made, float [F, H, W, 3].
    """

    methods: dict[str, Policy]
    steps: frozenset[int]
    places: dict[tuple[int, int, str], Place] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    full: bool = False
    frames: Any = None
    bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def wants(self, layer: int, step: int | None) -> bool:
        known = any((layer, step, name) in self.places for name in self.methods)
        return step in self.steps and not known and not self.full

    def take(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> None:
        """Ask every method about one call. Tensors [B, S, H, D] in the order of the sequence."""
        # with guidance in one batch the sample with the prompt comes last
        query, key, value = (x[-1:].detach() for x in (query, key, value))
        if terms.key_mask is not None:
            terms = terms._replace(key_mask=terms.key_mask[-1:])
        step = context.clock.step or 0
        for name, policy in self.methods.items():
            if name in self.refused:
                continue
            try:
                place = _place(policy, query, key, value, context, terms)
            except Exception as error:
                # one method's limit is told; the others are recorded
                self.refused[name] = f"{type(error).__name__}: {error}"
                continue
            self.bytes += 2 * (place.mass.numel() + place.kept.numel())
            self.places[context.layer, step, name] = place
        self.full = self.bytes > MOST_BYTES


@dataclass(frozen=True, kw_only=True)
class Recorder(Policy):
    """A policy that chooses nothing: it records, and attention stays dense. Not registered."""

    recording: Any = field(default=None, repr=False, compare=False)

    def stays_dense(self, layout: TokenLayout, device: str, context: Context) -> str | None:
        wanted = self.recording.wants(context.layer, context.clock.step)
        return None if wanted and context.clock.branch != "uncond" else "not recorded"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended | None:
        self.recording.take(query, key, value, context, terms)
        return None

    def select(self, query: Tensor, key: Tensor, tiles: Tiling, context: Context) -> None:
        return None


def _place(
    policy: Policy, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
) -> Place:
    tiles = policy.tiles(context.layout, query, context)
    member = _membership(tiles, query.shape[1])
    mass = _by_tile(_dense(terms), query, key, member, tiles)
    attended = policy.attend(query, key, value, context, terms)
    if attended is not None:
        # it chooses by token: what it gives to each tile, seen through values that name the tile
        def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = policy.attend(q, k, v, context, terms)
            assert out is not None
            return out.output

        kept = _by_tile(lambda q, k, v: (sparse(q, k, v) > 1e-6).to(v.dtype), query, key, member,
                        tiles)
    else:
        q, k = (permute_tokens(x, tiles.order) for x in (query, key))
        mask = policy.select(q, k, tiles, context)
        if mask is None:
            raise ValueError("it chooses dense here")
        kept = mask.keep[0].float()
    layout, half = context.layout, torch.float16
    return Place(layout, _on_cpu(tiles), mass.to(half).cpu(), kept.to(half).cpu())


def _dense(terms: Terms) -> Any:
    mask = None if terms.key_mask is None else terms.key_mask[:, None, None, :]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=terms.scale, **gqa)
        return out.transpose(1, 2)

    return attention


def _membership(tiles: Tiling, tokens: int) -> Tensor:
    """Int64 [S]: the tile of each token, in the order of the sequence."""
    ids = torch.repeat_interleave(torch.arange(tiles.blocks, device=tiles.order.device),
                                  tiles.lengths.long())
    return torch.empty_like(ids).scatter_(0, tiles.order[:tokens], ids)


def _by_tile(attention: Any, query: Tensor, key: Tensor, member: Tensor, tiles: Tiling) -> Tensor:
    """Attention over values that are 1 in one tile and 0 elsewhere: float32 [H, N, N].

    As many tiles at once as a head is wide. Averaged over the queries of each tile.
    """
    width, heads = key.shape[-1], query.shape[2]
    columns = []
    for begin in range(0, tiles.blocks, width):
        names = torch.arange(begin, begin + width, device=member.device)
        value = (member[:, None] == names).to(key.dtype)
        value = value[None, :, None, :].expand(1, -1, key.shape[2], -1).contiguous()
        columns.append(attention(query, key, value)[0].float())
    whole = torch.cat(columns, dim=-1)[..., :tiles.blocks]
    summed = torch.zeros(tiles.blocks, heads, tiles.blocks, device=whole.device)
    summed.index_add_(0, member, whole)
    return (summed / tiles.lengths[:, None, None]).permute(1, 0, 2)


def _on_cpu(tiles: Tiling) -> Tiling:
    return replace(tiles, **{name: part.cpu() for name, part in vars(tiles).items()
                             if isinstance(part, Tensor)})


@dataclass(frozen=True)
class Share:
    """Of one head: density of what is kept, attention mass it holds, and the most it could hold."""

    density: float
    held: float
    best: float


def share(place: Place, head: int) -> Share:
    """How well the kept tiles cover the mass; `best` picks pairs by mass at the same density."""
    part = place.tiles.lengths.double()
    part = part / part.sum()
    mass, kept = place.mass[head].double(), place.kept[head].double()
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)
    density = float(part @ kept @ part)
    held = float(part @ (mass * kept).sum(-1))
    cost = part[:, None] * part[None, :]
    order = (mass / part[None, :]).flatten().argsort(descending=True)
    each = cost.flatten()[order]
    # the last one in part: tiles of uneven length seldom meet the density
    taken = ((density - each.cumsum(0)) / each + 1).clamp(0, 1)
    value = (part[:, None] * mass).flatten()[order]
    return Share(density, held, float((value * taken).sum()))
