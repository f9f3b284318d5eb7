"""Block: one Transformer2DModel whose later layers work on the tokens that matter."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.layout import TokenLayout
from fastdiff.method import Host
from fastdiff.tokens.block_cost import block_verdict
from fastdiff.tokens.costs import Verdict, number, pays
from fastdiff.tokens.entry import Branches, Entry, Phase, Site, fixed, wants_gradients
from fastdiff.tokens.rank import rows


def layers_of(module: Any) -> list[Any]:
    return list(module.transformer_blocks)


class Block:
    """One Transformer2DModel that is pruned, and what it keeps during a call."""

    def __init__(self, method: Any, host: Host, site: Site, phase: Phase, branches: Branches,
                 spared: bool) -> None:
        self.method = method
        self.report = host.report
        self._stays_stock = host.fallback
        self.site = site
        self.layers = layers_of(site.module)
        self.go = False
        self._number = number(self)
        self._phase = phase
        self._branches = branches
        self._spared = spared
        self._clear()

    def __deepcopy__(self, memo: dict) -> "Block":
        return self

    def enter(self, entry: Entry) -> None:
        first, last = self.layers[0], self.layers[-1]
        entry.before(self.site.module, self._begin)
        if len(self.layers) > 1:
            entry.after(first, self._drop)
            entry.after(last, self._fill)
            return
        for part in (first.attn2, first.ff):
            if part is not None:
                entry.before(part, self._narrow)
                entry.after(part, self._widen)

    def _clear(self) -> None:
        self.kept: Tensor | None = None
        self.place: Tensor | None = None
        self.state: Tensor | None = None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._clear()
        arguments = self.site.look(args, kwargs)
        layout = self.site.layout
        if layout is None or self.count_of(layout.tokens) == layout.tokens:
            self.go = False
            return
        if self._spared and self._phase.early:
            self.go = False
            self._count("blocks whole: early step")
            return
        problem = self._problem(arguments)
        if problem is not None:
            self.go = False
            self._fallback(problem)
            return
        self.go = not self.method.guard or self._pays(layout, arguments)
        self._count("blocks pruned" if self.go else "blocks whole: would not pay")

    def count_of(self, tokens: int) -> int:
        """How many tokens stay: a multiple of 8 where there are enough."""
        kept = round(self.method.keep * tokens)
        if tokens >= 256:
            kept = round(kept / 8) * 8
        return min(tokens, max(1, kept))

    def _problem(self, arguments: dict[str, Any]) -> str | None:
        extra = arguments.get("cross_attention_kwargs") or {}
        for name in ("gligen", "ip_adapter_masks"):
            if extra.get(name) is not None:
                return f"{name} needs every token"
        if arguments.get("attention_mask") is not None:
            return "an attention mask over the tokens"
        if any(getattr(layer, "_chunk_size", None) is not None for layer in self.layers):
            return "feed-forward chunking"
        return None

    def _pays(self, layout: TokenLayout, arguments: dict[str, Any]) -> bool:
        hidden = arguments["hidden_states"]
        text = arguments.get("encoder_hidden_states")
        if isinstance(text, tuple):
            text = text[0]  # IP-Adapter: text, then pictures
        words = (0, 0) if text is None else (fixed(text.shape[1]), fixed(text.shape[2]))
        sizes = (self.site.batch, layout.tokens, *words)
        return pays(self._number, sizes, str(hidden.device), str(hidden.dtype))

    def judge(self, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Verdict:
        batch, tokens, *words = sizes
        return block_verdict(self, batch, tokens, (words[0], words[1]), device, dtype)

    def told(self, sizes: tuple[int, ...], found: Verdict) -> None:
        tokens = sizes[1]
        what = f"{self.count_of(tokens)} of {tokens} tokens" if found.pays else "whole"
        blocks = f"blocks of {tokens} tokens, {len(self.layers)} layers"
        self.report.tell(self.method.name, blocks, f"{what} ({found})")

    def stage(self, attend, query, key, value, mask, scale):
        """Around the first self-attention: rank by its queries and keys."""
        out = attend(query, key, value, mask)
        if not self.go:
            return out
        layout = self.site.layout
        problem = None
        assert layout is not None
        if mask is not None or not query.shape[1] == key.shape[1] == layout.tokens:
            problem = "its self-attention is not over the grid alone"
        elif query.shape[0] != self.site.batch:
            problem = "its self-attention sees another batch (perturbed-attention guidance)"
        elif wants_gradients(query, key):
            problem = "gradients are wanted, and the ranking has none"
        if problem is not None:
            self._fallback(problem)
            return out
        branches = self._branches.count if self.method.align else 1
        self.kept, self.place = self.method.rank(
            query, key, scale, self.count_of(layout.tokens), branches)
        return out

    def _drop(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.kept is None:
            return None
        if self.method.recover != "similar":
            self.state = output
        return rows(output, self.kept)

    def _fill(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        kept, place, state = self.kept, self.place, self.state
        self._clear()
        if kept is None or place is None:
            return None
        if state is None:
            return rows(output, place)
        index = kept[..., None].expand_as(output)
        if self.method.recover == "increment":
            change = output - rows(state, kept)
            state = state + rows(change, place)
        # kept tokens exactly, without the rounding of adding a difference
        return state.scatter(1, index, output)

    def _narrow(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Before cross-attention or feed-forward of a block of one layer: its kept rows."""
        if self.kept is None:
            return None
        return (rows(args[0], self.kept), *args[1:]), kwargs

    def _widen(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """After it: the increment of every token's stand-in, zero with recover="own"."""
        kept, place = self.kept, self.place
        if module is self.layers[0].ff:
            self._clear()
        if kept is None or place is None:
            return None
        if self.method.recover != "own":
            return rows(output, place)
        whole = output.new_zeros(output.shape[0], place.shape[1], output.shape[2])
        return whole.scatter(1, kept[..., None].expand_as(output), output)

    def _count(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            self.report.count(self.method.name, what)

    def _fallback(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self._stays_stock(f"{self.method.name} in {self.site.name}", reason)
