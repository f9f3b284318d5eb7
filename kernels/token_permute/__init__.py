"""Reorder the tokens of a sequence, and put them back."""

from torch import Tensor

__all__ = ["permute_tokens", "unpermute_tokens"]


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x: [B, S, H, D]; order: integer [S]. Token `i` of the result is token `order[i]` of x."""
    return x.index_select(1, order)


def unpermute_tokens(x: Tensor, inverse: Tensor) -> Tensor:
    """The exact inverse of `permute_tokens`; inverse: integer [S], the inverse permutation."""
    return x.index_select(1, inverse)
