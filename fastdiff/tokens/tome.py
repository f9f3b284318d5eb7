"""ToMe: merge similar tokens around self-attention: the control that users know."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.clock import StepClock
from fastdiff.method import Host, Method, check
from fastdiff.tokens.entry import Entry, Phase, Site, check_steps, sites
from fastdiff.tokens.rank import PAIRS, best, rest_of, rows


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Before self-attention the most similar tokens are merged by their mean, after it copied back.

    One token of every 2 x 2 cell is a destination; of the others, the `ratio` of all tokens that
    are most similar to a destination merge into it. Similarity is the cosine of the input of the
    self-attention, compared for all pairs, in every layer and step.

    ratio: fraction of the tokens that merge away, 0 to 0.75; more would need larger cells.
    levels: how many attention levels of a UNet, from the finest that has attention. Counting from
        there makes it act on SDXL, which has no attention at full resolution.
    random: destinations are drawn anew in every step, the same for all samples; else the first
        token of each cell.
    dense_steps: first steps without merging; an int counts steps, a float is a fraction of them.
    seed: of the draw.

    A control, not for speed: against fused attention the comparison of all pairs costs about what
    merging saves, so there is no guard that would hide it. UNets (Stable Diffusion 1.5, 2, XL) and
    PixArt or DiT; models with rotary positions or text in the same attention are refused. Source:
    ToMe for Stable Diffusion (arXiv 2303.17604). Differs from its public code: similarity is read
    after the norm, and the draw depends on seed and step alone.
    """

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "merge similar tokens around self-attention: a control, not for speed"
    kind: ClassVar[str] = "tokens"

    ratio: float = 0.5
    levels: int = 1
    random: bool = True
    dense_steps: int | float = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 <= self.ratio <= 0.75, "ratio", self.ratio, "a fraction from 0 to 0.75")
        check(self.levels >= 1, "levels", self.levels, "1 or more")
        check_steps("dense_steps", self.dense_steps)

    def attach(self, host: Host) -> Callable[[], None]:
        entry, phase = Entry(), Phase(host.clock, self.dense_steps)
        draw = _Draw(self, host.clock)
        merged = 0
        try:
            for name, part in host.models.items():
                entry.claim(part.model, self.name, ("at-edm", "zero-tprune"))
                here = _finest(sites(name, part), self.levels)
                watched: dict[str, Any] = {}
                for path, site in here.items():
                    layers = _plain_layers(site.module)
                    inner = f"{path}." if path else ""
                    watched |= {f"{inner}transformer_blocks.{i}.attn1": _as_it_is
                                for i, _ in enumerate(layers)}
                    if layers:
                        entry.before(site.module, site.hook())
                    for layer in layers:
                        merge = _Merge(self, host, site, phase, draw)
                        entry.before(layer.attn1, merge.before)
                        entry.after(layer.attn1, merge.after)
                        merged += 1
                entry.stages(part.model, host.clock, watched)
            if not merged:
                kinds = ", ".join(type(part.model).__name__ for part in host.models.values())
                raise ValueError(
                    f"{self.name} merges tokens around plain self-attention (UNets of Stable "
                    f"Diffusion, PixArt, DiT), and {kinds} has none: its tokens carry rotary "
                    "positions or share attention with text. Use kv-downsample there.")
        except BaseException:
            entry.leave()
            raise
        return entry.leave


def _as_it_is(attend, query, key, value, mask, scale):
    """A stage that does nothing: graphs are guarded by stages, and not by hooks."""
    return attend(query, key, value, mask)


def _plain_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in getattr(module, "transformer_blocks", ())
            if type(layer).__name__ == "BasicTransformerBlock" and not layer.only_cross_attention]


def _finest(here: dict[str, Site], levels: int) -> dict[str, Site]:
    """The sites of the first `levels` levels of a UNet; all of a model without levels."""
    ups = [int(path.split(".")[1]) for path in here if path.startswith("up_blocks")]
    level = {}
    for path in here:
        kind, _, rest = path.partition(".")
        if kind == "down_blocks":
            level[path] = int(rest.split(".")[0])
        elif kind == "up_blocks":
            # the last up block that has attention mirrors the first down block that has it
            downs = [int(p.split(".")[1]) for p in here if p.startswith("down_blocks")]
            level[path] = min(downs, default=0) + max(ups) - int(rest.split(".")[0])
        else:
            level[path] = 0 if not ups else 1 << 20
    first = min(level.values(), default=0)
    return {path: site for path, site in here.items() if level[path] < first + levels}


class _Draw:
    """The seed of the running step as a tensor, so that a graph does not depend on its value."""

    def __init__(self, method: ToMe, clock: StepClock) -> None:
        self.number = torch.zeros((), dtype=torch.int64)
        self._seed = method.seed
        self._clock = clock
        clock.on_begin(self._next)
        clock.on_advance(self._next)
        self._next()

    def __deepcopy__(self, memo: dict) -> "_Draw":
        return self

    def _next(self) -> None:
        self.number.fill_(self._seed * 1_000_003 + (self._clock.step or 0))


class _Merge:
    """The two hooks of one self-attention."""

    def __init__(self, method: ToMe, host: Host, site: Site, phase: Phase, draw: _Draw) -> None:
        self._method = method
        self._report = host.report
        self._site = site
        self._phase = phase
        self._draw = draw
        self._place: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "_Merge":
        return self

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        self._place = None
        layout, states = self._site.layout, args[0] if args else None
        if states is None or layout is None or self._phase.early:
            return None
        if states.shape[1] != layout.tokens or kwargs.get("attention_mask") is not None:
            return None
        _, height, width = layout.grid
        most = layout.tokens - (height // 2) * (width // 2)
        gone = min(int(self._method.ratio * layout.tokens), most)
        if gone == 0 or most == layout.tokens:
            return None
        place, order, lengths = plan_merge(states, self._draw.number, height, width, gone,
                                           self._method.random)
        if not torch.compiler.is_compiling():
            self._report.count(self._method.name, "attention calls on merged tokens")
            self._report.tell(self._method.name, f"{layout.tokens} tokens",
                              f"merged to {layout.tokens - gone}")
        self._place = place
        merged = merge_tokens(states, order, lengths)
        return (merged, *args[1:]), kwargs

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        place, self._place = self._place, None
        return None if place is None else rows(output, place)


@torch.library.custom_op("fastdiff::plan_merge", mutates_args=())
def plan_merge(
    states: Tensor, draw: Tensor, height: int, width: int, gone: int, random: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens become one, for states [B, S, C] with S = height * width.

    returns: place int64 [B, S], where in the merged sequence every token went; order int64 [B * S],
        tokens of the whole batch by place; lengths int64 [B, S - gone], tokens at each place.
    """
    batch, tokens = states.shape[:2]
    heads = destinations(height, width, int(draw) if random else None)
    heads = heads.to(states.device).expand(batch, -1)
    others = rest_of(heads, tokens)
    flat = F.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
    a, b = rows(flat, others), rows(flat, heads)
    step = max(1, PAIRS // max(1, batch * b.shape[1]))
    found = [(part @ b.mT).max(-1) for part in a.split(step, dim=1)]
    likeness = torch.cat([f.values for f in found], 1)
    nearest = torch.cat([f.indices for f in found], 1)
    merge = best(likeness, gone)
    stay = others.gather(1, rest_of(merge, others.shape[1]))
    alone = stay.shape[1]
    place = torch.empty(batch, tokens, dtype=torch.int64, device=states.device)
    place.scatter_(1, stay, torch.arange(alone, device=states.device).expand_as(stay))
    own = torch.arange(heads.shape[1], device=states.device) + alone
    place.scatter_(1, heads, own.expand_as(heads))
    place.scatter_(1, others.gather(1, merge), nearest.gather(1, merge) + alone)
    left = tokens - gone
    whole = (place + torch.arange(batch, device=states.device)[:, None] * left).flatten()
    lengths = torch.bincount(whole, minlength=batch * left).view(batch, left)
    return place, whole.argsort(stable=True), lengths


@plan_merge.register_fake
def _(states, draw, height, width, gone, random):
    batch, tokens = states.shape[:2]
    new = {"dtype": torch.int64}
    return (states.new_empty((batch, tokens), **new), states.new_empty((batch * tokens,), **new),
            states.new_empty((batch, tokens - gone), **new))


@torch.library.custom_op("fastdiff::merge_tokens", mutates_args=())
def merge_tokens(states: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """Means of the tokens that share a place, [B, S - gone, C]; the same bits in every run."""
    batch, left = lengths.shape
    precision = torch.promote_types(states.dtype, torch.float32)
    ordered = states.flatten(0, 1).index_select(0, order).to(precision)
    mean = torch.segment_reduce(ordered, "mean", lengths=lengths.flatten(), axis=0)
    return mean.to(states.dtype).view(batch, left, states.shape[-1])


@merge_tokens.register_fake
def _(states, order, lengths):
    return states.new_empty((*lengths.shape, states.shape[-1]))


def destinations(height: int, width: int, seed: int | None) -> Tensor:
    """One token of every whole 2 x 2 cell, ascending int64 [1, cells]; None takes the first."""
    rows_of, columns = height // 2, width // 2
    y, x = torch.meshgrid(torch.arange(rows_of, device="cpu") * 2,
                          torch.arange(columns, device="cpu") * 2, indexing="ij")
    if seed is not None:
        generator = torch.Generator("cpu").manual_seed(seed)
        pick = torch.randint(4, (rows_of, columns), generator=generator, device="cpu")
        y, x = y + pick // 2, x + pick % 2
    count = math.prod((rows_of, columns))
    return (y * width + x).flatten().sort().values.view(1, count)
