"""Random problems for window attention, and how far a result may be from the float64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_cases import poisoned

from fastdiff.kernels.window_attention import window_attention

Grid = tuple[int, int, int]


@dataclass
class Case:
    grid: Grid
    window: Grid
    stride: Grid = (1, 1, 1)
    causal: str = ""
    before: int = 0
    after: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.float32
    masked: bool = False
    strided: bool = False
    seed: int = 0

    def build(self, device: str = "cpu") -> dict:
        """The arguments of the op."""
        g = torch.Generator().manual_seed(self.seed)
        t, h, w = self.grid
        tokens = self.before + t * h * w + self.after

        def randn(heads: int) -> torch.Tensor:
            if self.strided:
                # every dimension but the last cut from something larger, heads before tokens
                whole = torch.randn(self.batch, heads + 1, tokens + 3, self.dim + 8, generator=g)
                whole = whole.to(self.dtype).to(device)
                return whole[:, 1:, 2:-1, : self.dim].transpose(1, 2)
            whole = torch.randn(self.batch, tokens, heads, self.dim, generator=g)
            return whole.to(self.dtype).to(device)

        mask = None
        if self.masked:
            mask = (torch.rand(self.batch, tokens, generator=g) < 0.7).to(device)
        return {
            "query": randn(self.heads), "key": randn(self.kv_heads), "value": randn(self.kv_heads),
            "grid": self.grid, "window": self.window, "stride": self.stride,
            "causal": tuple(axis in self.causal for axis in "thw"), "before": self.before,
            "key_mask": mask,
        }


def check(case: Case, device: str, impl: str) -> tuple[float, float]:
    """Compare `impl` with the reference in float64; returns (error, allowed).

    Allowed: the error of the reference in the case's own precision; each probability and the output
    rounded once, together at most eps * max|v|; and scores whose float32 sums are off by
    2 eps |q||k|.
    """
    args = case.build(device)
    wide = {name: args[name].double() for name in ("query", "key", "value")}
    truth = window_attention(**{**args, **wide}, impl="reference")
    eager = window_attention(**args, impl="reference")
    with poisoned():
        found = window_attention(**args, impl=impl)
    assert found.dtype == case.dtype and found.shape == truth.shape
    assert found.is_contiguous() and not found.isnan().any()
    q, k, v = wide.values()
    norms = q.norm(dim=-1).max().item() * k.norm(dim=-1).max().item() / case.dim**0.5
    rounding = torch.finfo(case.dtype).eps + 4 * torch.finfo(torch.float32).eps * norms
    allowed = (eager.double() - truth).abs().max().item() + rounding * v.abs().max().item()
    error = (found.double() - truth).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    return error, allowed
