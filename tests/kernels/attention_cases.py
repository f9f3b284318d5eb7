"""Random attention problems, the float64 yardstick, and memory that shows what is not written."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch

from fastdiff.kernels.block_sparse_attention import block_sparse_attention

HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def ragged_offsets(tokens: int, block: int, generator: torch.Generator) -> torch.Tensor:
    """Blocks of 0 to `block` tokens."""
    ends = [0]
    while ends[-1] < tokens:
        step = int(torch.randint(0, block + 1, (), generator=generator))
        ends.append(min(tokens, ends[-1] + step))
    return torch.tensor(ends, dtype=torch.int32)


def equal_offsets(tokens: int, block: int) -> torch.Tensor:
    """Blocks of `block` tokens, the last one shorter when it must be."""
    return torch.tensor([*range(0, tokens, block), tokens], dtype=torch.int32)


@dataclass
class Case:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 64
    keys: int = 64
    dim: int = 64
    block_q: int = 16
    block_k: int = 16
    dtype: torch.dtype = torch.float32
    ragged: bool = False
    masked: bool = False
    tail: bool = False
    all_kept: bool = False
    strided: bool = False
    seed: int = 0
    ordered: bool = False

    def build(self, device: str = "cpu") -> dict:
        """The arguments of the op; entries beyond the counts are garbage, some rows are empty."""
        g = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            if self.strided:
                # every dimension but the last cut from something larger, heads before tokens
                b, s, h, d = shape
                whole = torch.randn(b, h + 1, s + 3, d + 8, generator=g).to(self.dtype).to(device)
                return whole[:, 1:, 2:-1, :d].transpose(1, 2)
            return torch.randn(*shape, generator=g).to(self.dtype).to(device)

        q = randn(self.batch, self.queries, self.heads, self.dim)
        k, v = (randn(self.batch, self.keys, self.kv_heads, self.dim) for _ in range(2))
        if self.ragged:
            q_off = ragged_offsets(self.queries, self.block_q, g)
            k_off = ragged_offsets(self.keys, self.block_k, g)
        else:
            q_off = equal_offsets(self.queries, self.block_q)
            k_off = equal_offsets(self.keys, self.block_k)
        NQ, NK = len(q_off) - 1, len(k_off) - 1
        shape = (self.batch, self.heads, NQ)
        counts = torch.randint(0, NK + 1, shape, generator=g)
        if self.all_kept:
            counts.fill_(NK)
        indices = torch.rand(*shape, NK, generator=g).argsort(-1)
        listed = torch.arange(NK) < counts[..., None]
        keep = torch.zeros(*shape, NK, dtype=torch.bool).scatter_(-1, indices, listed)
        indices = torch.where(listed, indices, -(1 << 30))
        key_mask = None
        if self.masked:
            key_mask = torch.rand(self.batch, self.keys, generator=g) < 0.7
            k[~key_mask.to(device)] = torch.nan
            v[~key_mask.to(device)] = torch.nan
        tail = None
        if self.tail:
            mean = [
                torch.randn(self.batch, self.kv_heads, NK, self.dim, generator=g) for _ in range(2)
            ]
            weight = torch.randint(0, 4, (self.batch, NK), generator=g).float() * 5
            tail = tuple(x.to(self.dtype).to(device) for x in mean)
            tail = (*tail, weight.to(device), keep.to(device))
        order = None
        if self.ordered:
            order = torch.randperm(counts.numel(), generator=g).int().to(device)
        return {
            "query": q,
            "key": k,
            "value": v,
            "indices": indices.int().to(device),
            "counts": counts.int().to(device),
            "query_offsets": q_off.to(device),
            "key_offsets": k_off.to(device),
            "block_q": self.block_q,
            "block_k": self.block_k,
            "key_mask": None if key_mask is None else key_mask.to(device),
            "tail": tail,
            "order": order,
        }


def in_float64(args: dict) -> dict:
    tail = args["tail"]
    if tail is not None:
        tail = (tail[0].double(), tail[1].double(), *tail[2:])
    q, k, v = (args[name].double() for name in ("query", "key", "value"))
    return {**args, "query": q, "key": k, "value": v, "tail": tail}


def allowances(args: dict, truth: torch.Tensor, eager: torch.Tensor) -> tuple[float, float]:
    """How far output and LSE may be from the float64 truth.

    The eager computation's own error; each probability and the output rounded once to the input's
    dtype, together at most eps * max|v|; and scores whose float32 sums are off by 2 eps |q||k|.
    """
    q, k, v = (args[name].nan_to_num().double() for name in ("query", "key", "value"))
    if args["tail"] is not None:
        k = torch.cat((k, args["tail"][0].transpose(1, 2)), 1)
        v = torch.cat((v, args["tail"][1].transpose(1, 2)), 1)
    largest = v.abs().max().item()
    norms = q.norm(dim=-1).max().item() * k.norm(dim=-1).max().item() / q.shape[-1] ** 0.5
    score = 2 * torch.finfo(torch.float32).eps * norms
    rounding = torch.finfo(args["query"].dtype).eps + 2 * score
    own = (eager.double() - truth).abs().max().item()
    return own + rounding * largest, score + 1e-5


def check(args: dict, impl: str) -> tuple[float, float]:
    """Compare `impl` with the reference in float64; returns (error, allowed)."""
    truth, truth_lse = block_sparse_attention(**in_float64(args), return_lse=True, impl="reference")
    eager, _ = block_sparse_attention(**args, return_lse=True, impl="reference")
    with poisoned():
        found, lse = block_sparse_attention(**args, return_lse=True, impl=impl)
    assert found.dtype == args["query"].dtype and found.shape == args["query"].shape
    assert found.is_contiguous() and not found.isnan().any()
    allowed, allowed_lse = allowances(args, truth, eager)
    error = (found.double() - truth).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    empty = truth_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not found.transpose(1, 2)[empty].any()
    torch.testing.assert_close(lse[~empty].double(), truth_lse[~empty], rtol=1e-6, atol=allowed_lse)
    return error, allowed


@contextlib.contextmanager
def poisoned():
    """`torch.empty` hands out NaN, so a tile that is never written shows."""
    empty = torch.empty

    def filled(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    with mock.patch.object(torch, "empty", filled):
        yield
