"""KVDownsample: every query stays, keys and values of small cells of the grid become one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.layout import TokenLayout
from fastdiff.method import Host, Method, check
from fastdiff.seam import attention_modules, crossing
from fastdiff.tokens.costs import Verdict, number, pays, verdict
from fastdiff.tokens.entry import Entry, Phase, Site, check_steps, fixed, sites

POOL = ("mean", "nearest")


@dataclass(frozen=True, kw_only=True)
class KVDownsample(Method):
    """Self-attention over fewer keys: one for each cell of `factor` x `factor` tokens.

    Queries, and with them the output, are untouched, so nothing has to be filled in. Text tokens
    keep their own keys. UNets and diffusion transformers, also with text in the same attention.

    factor: side of a cell in tokens, in height and width; frames are never merged.
    pool: "mean" of keys and of values, or the "nearest" (first) token of the cell.
    correct: raise the logit of a key by the log of the tokens it stands for. Without it text would
        gain weight against the picture. Where all keys stand for the same number it changes
        nothing and is left out.
    min_tokens: shorter grids keep every key.
    dense_steps: first steps that keep every key; an int counts steps, a float is a fraction.
    guard: only where a measurement on this machine says that it pays.

    Cost: one pass over keys and values. Where text shares the attention, or cells are cut by the
    border, the correction is an additive mask, and attention kernels that take one are slower.
    Limits: details that a single key holds are averaged away; with an attention method on the
    same layers, fewer keys win and attention is dense over them. Source: ToDo (arXiv 2402.13573),
    which takes the nearest key and has no correction; means and the correction are as in the
    pooled branch of CLEAR (arXiv 2412.16112), without its training.
    """

    name: ClassVar[str] = "kv-downsample"
    summary: ClassVar[str] = "one key and value for each cell of tokens, all queries kept"
    kind: ClassVar[str] = "tokens"

    factor: int = 2
    pool: str = "mean"
    correct: bool = True
    min_tokens: int = 2048
    dense_steps: int | float = 0
    guard: bool = True

    def __post_init__(self) -> None:
        check(self.factor >= 1, "factor", self.factor, "1 or more tokens")
        check(self.pool in POOL, "pool", self.pool, f"one of {', '.join(POOL)}")
        check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        check_steps("dense_steps", self.dense_steps)

    def attach(self, host: Host) -> Callable[[], None]:
        entry, phase = Entry(), Phase(host.clock, self.dense_steps)
        for name, part in host.models.items():
            entry.claim(part.model, self.name, ())
            here = sites(name, part)
            stages: dict[str, Any] = {}
            for path, site in here.items():
                entry.before(site.module, site.hook())
                inner = f"{path}." if path else ""
                for layer, _ in attention_modules(part.model):
                    if layer.startswith(inner) and not any(s in layer for s in part.family.skip):
                        stages[layer] = _Keys(self, host, site, phase, f"{name}.{layer}")
            entry.stages(part.model, host.clock, stages)
        return entry.leave


class _Keys:
    """The stage of one attention module."""

    def __init__(self, method: KVDownsample, host: Host, site: Site, phase: Phase,
                 name: str) -> None:
        self.method = method
        self.site = site
        self.name = name
        self._report = host.report
        self._fallback = host.fallback
        self._phase = phase
        self._number = number(self)

    def __deepcopy__(self, memo: dict) -> "_Keys":
        return self

    def __call__(self, attend, query, key, value, mask, scale):
        method, tokens = self.method, key.shape[1]
        if self._phase.early or method.factor == 1 or crossing(tokens):
            return attend(query, key, value, mask)
        whole = self.site.layout
        layout = None if whole is None else whole.matching(tokens)
        if layout is None:
            if whole is None:
                self._stock("the latent grid of this model is not known")
            return attend(query, key, value, mask)  # text, time, or a grid that lost tokens
        if layout.grid_tokens < method.min_tokens:
            return attend(query, key, value, mask)
        if mask is not None and not _pads_keys(mask, key):
            self._stock("an attention mask that is no key padding")
            return attend(query, key, value, mask)
        if method.guard and not self._pays(query, key, layout):
            self._count("calls with every key: would not pay")
            return attend(query, key, value, mask)
        self._count("calls over fewer keys")
        return attend(query, *downsample(
            key, value, mask, layout, method.factor, method.pool, method.correct))

    def _pays(self, query: Tensor, key: Tensor, layout: TokenLayout) -> bool:
        sizes = (fixed(query.shape[0]), *layout.grid, layout.before, layout.after,
                 fixed(query.shape[2]), fixed(key.shape[2]), fixed(query.shape[3]))
        return pays(self._number, sizes, str(query.device), str(query.dtype))

    def judge(self, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Verdict:
        batch, frames, height, width, before, after, heads, key_heads, dim = sizes
        layout = TokenLayout((frames, height, width), before, after)
        method = self.method
        what = (f"kv-downsample {method.factor} {method.pool} {method.correct}, batch {batch}, "
                f"grid {layout.grid}, text {before + after}, heads {heads} {key_heads}, dim {dim}")

        def tensors() -> tuple[Tensor, Tensor, Tensor]:
            q = torch.randn(batch, layout.tokens, heads, dim, device=device).to(dtype)
            k, v = torch.randn(2, batch, layout.tokens, key_heads, dim, device=device).to(dtype)
            return q, k, v

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=heads != key_heads)

        def stock() -> Callable[[], Tensor]:
            q, k, v = tensors()
            return lambda: attend(q, k, v, None)

        def ours() -> Callable[[], Tensor]:
            q, k, v = tensors()
            return lambda: attend(q, *downsample(
                k, v, None, layout, method.factor, method.pool, method.correct))

        return verdict(what, device, dtype, stock, ours)

    def told(self, sizes: tuple[int, ...], found: Verdict) -> None:
        tokens = sizes[1] * sizes[2] * sizes[3]
        what = f"1 key in {self.method.factor ** 2}" if found.pays else "every key"
        self._report.tell(self.method.name, f"{tokens} tokens, {sizes[6]} heads",
                          f"{what} ({found})")

    def _count(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            self._report.count(self.method.name, what)

    def _stock(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self._fallback(f"{self.method.name} in {self.name}", reason)


def _pads_keys(mask: Any, key: Tensor) -> bool:
    """Whether this is a bool mask over the keys alone, [B, S] or [B, 1, 1, S]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[-1] != key.shape[1]:
        return False
    return mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1:3] == (1, 1))


def downsample(
    key: Tensor, value: Tensor, mask: Tensor | None, layout: TokenLayout, factor: int, pool: str,
    correct: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fewer keys and values, and the bias of their logits [B or 1, 1, 1, K] (None: none needed).

    key, value: [B, S, H, D]. mask: bool over the keys, see `_pads_keys`; a token that it hides
    counts for nobody, and a cell of such tokens alone gets the bias -inf. Text comes first and
    last as before, cells between them in raster order.
    """
    height, width = layout.grid[1:]
    whole = height % factor == 0 and width % factor == 0
    text = layout.before + layout.after
    if mask is None and whole:
        k, v = (_pooled(x, layout, factor, pool) for x in (key, value))
        if not text or not correct:
            return k, v, None
        weight = key.new_full((1, k.shape[1]), float(factor * factor))
        weight[:, : layout.before] = 1
        weight[:, k.shape[1] - layout.after:] = 1
        return k, v, weight.log()[:, None, None]
    counts = key.new_ones((1, key.shape[1], 1, 1)) if mask is None else (
        mask.reshape(-1, key.shape[1], 1, 1).to(key.dtype))
    weight = _summed(counts, layout, factor)
    if pool == "mean":
        total = weight.clamp_min(1)
        # a hidden token may hold anything, NaN too
        k, v = (_summed(x if mask is None else x.masked_fill(counts == 0, 0), layout, factor)
                / total for x in (key, value))
    else:
        # nearest needs a token that counts, so one that does not hides its whole cell
        first = _first(counts, layout, factor)
        weight = weight * first
        k, v = (_first(x, layout, factor) for x in (key, value))
    bias = weight if correct else (weight > 0).to(weight.dtype)
    return k, v, bias.log().reshape(bias.shape[0], 1, 1, -1)


def _pooled(x: Tensor, layout: TokenLayout, factor: int, pool: str) -> Tensor:
    if pool == "nearest":
        return _first(x, layout, factor)
    before, grid, after = _parts(x, layout)
    cells = grid.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean((3, 5))
    return torch.cat((before, cells.flatten(1, 3), after), 1)


def _first(x: Tensor, layout: TokenLayout, factor: int) -> Tensor:
    before, grid, after = _parts(x, layout)
    return torch.cat((before, grid[:, :, ::factor, ::factor].flatten(1, 3), after), 1)


def _summed(x: Tensor, layout: TokenLayout, factor: int) -> Tensor:
    """Sums over the cells, also over those that the border cuts."""
    before, grid, after = _parts(x, layout)
    below, right = (-size % factor for size in layout.grid[1:])
    grid = F.pad(grid, (0, 0, 0, 0, 0, right, 0, below))
    cells = grid.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).sum((3, 5))
    return torch.cat((before, cells.flatten(1, 3), after), 1)


def _parts(x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Text before, the grid [B, T, H, W, ...], text after."""
    before, grid, after = x.split((layout.before, layout.grid_tokens, layout.after), dim=1)
    return before, grid.unflatten(1, layout.grid), after
