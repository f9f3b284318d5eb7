"""Whether pruning one attention block of a UNet is faster on this machine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.tokens.costs import Verdict, verdict
from fastdiff.tokens.rank import rows


def block_verdict(
    block: Any, batch: int, tokens: int, text: tuple[int, int], device: torch.device,
    dtype: torch.dtype,
) -> Verdict:
    """Seconds of one block whole and pruned, from a layer of the same sizes with random weights."""
    from diffusers.models.attention import BasicTransformerBlock

    attention, method = block.layers[0].attn1, block.method
    width, heads, layers = attention.query_dim, attention.heads, len(block.layers)
    count = block.count_of(tokens)
    what = (f"batch {batch}, tokens {tokens}, width {width}, heads {heads}, layers {layers}, "
            f"text {text[0]} x {text[1]}")

    def parts() -> tuple[Any, Tensor, Tensor | None]:
        layer = BasicTransformerBlock(
            width, heads, width // heads, cross_attention_dim=text[1] or None,
            double_self_attention=False,
        ).to(device, dtype).requires_grad_(False)
        states = torch.randn(batch, tokens, width, device=device).to(dtype)
        words = torch.randn(batch, text[0], text[1], device=device).to(dtype) if text[0] else None
        return layer, states, words

    def run(layer: Any, states: Tensor, words: Tensor | None) -> Tensor:
        if layers > 1:
            for _ in range(layers - 1):
                states = layer(states, encoder_hidden_states=words)
            return states
        if words is not None:
            states = states + layer.attn2(states, encoder_hidden_states=words)
        return states + layer.ff(states)

    def stock() -> Callable[[], Tensor]:
        layer, states, words = parts()
        return lambda: run(layer, states, words)

    def ours() -> Callable[[], Tensor]:
        layer, states, words = parts()
        query, key = torch.randn(2, batch, tokens, heads, width // heads, device=device).to(dtype)

        def pruned() -> Tensor:
            kept, place = method.rank(query, key, None, count, 1)
            out = run(layer, rows(states, kept), words)
            if method.recover == "similar" and layers > 1:
                return rows(out, place)
            # the other ways of filling in, and the second gather of a block of one layer
            return states + rows(out - rows(states, kept), place)

        return pruned

    return verdict(what + f", {method.name} keeps {count}, {method.rank_key()}", device, dtype,
                   stock, ours)
