"""Noise levels of flow matching, with a share of draws close to pure noise."""

import torch
from torch import Tensor


def shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def draw_sigmas(n: int, shift: float, tail: float, device: torch.device) -> Tensor:
    """Levels [n] in [0, 1]: logit-normal, moved by `shift`; the share `tail` near 1 instead.

    A colour shared by thousands of tokens is settled by the first steps of sampling, at levels
    that the logit-normal draw hardly ever gives (above 0.98 once in 400 at shift 3).
    """
    s = shifted(torch.sigmoid(torch.randn(n, device=device)), shift)
    late = shifted(torch.rand(n, device=device), 16.0)
    return torch.where(torch.rand(n, device=device) < tail, late, s)
