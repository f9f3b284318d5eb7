"""Block-sparse attention against the best dense kernel, interleaved; E = 1 wastes nothing.

All candidates of a shape run in turn, round after round, so that they share the card's clocks.
E is the best dense time, times the density, over the sparse time. Memory: at most how much a call
adds to q, k and v, output and scratch, and, for a kernel alone, the lists that it is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402
from dense_kernels import dense_call, kernels  # noqa: E402
from timing import Run, clocks, host_microseconds, tried  # noqa: E402

from fastdiff.kernels.block_sparse_attention import (  # noqa: E402
    block_sparse_attention,
    implementations,
)
from fastdiff.kernels.row_order import late_first  # noqa: E402
from fastdiff.kernels.tile_gather import tile_gather  # noqa: E402
from fastdiff.kernels.tile_select import tile_select  # noqa: E402


class Shape(NamedTuple):
    """One comparison. pattern: random, local or uneven lists, or text rows that keep everything.
    ordered: late rows begin first; found in the call, but for text, whose rows are known before.
    method: the whole of tile-sparse (gather, selection, kernel, back) in place of the kernel."""

    name: str
    heads: int
    tokens: int
    dim: int
    density: float
    block_k: int = 128
    pattern: str = "random"
    tail: bool = False
    method: bool = False
    flex: bool = False
    ordered: bool = False


DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
TEXT_BLOCKS = 4
SHAPES = (
    Shape("Wan-1.3B 480p", 12, 32760, 128, 1 / 8, flex=True),
    *(Shape("32k", 12, 32768, 128, d) for d in (1 / 2, 1 / 4, 1 / 8, 1 / 16)),
    Shape("32k, keys by 64", 12, 32768, 128, 1 / 8, 64),
    Shape("32k, keys by 32", 12, 32768, 128, 1 / 8, 32),
    Shape("32k, keys by 16", 12, 32768, 128, 1 / 8, 16),
    Shape("32k, uneven rows", 12, 32768, 128, 1 / 8, pattern="uneven"),
    Shape("32k, uneven rows, late first", 12, 32768, 128, 1 / 8, pattern="uneven", ordered=True),
    Shape("32k, tail", 12, 32768, 128, 1 / 8, tail=True),
    Shape("32k, D=64", 12, 32768, 64, 1 / 4),
    Shape("32k, D=64", 12, 32768, 64, 1 / 8),
    Shape("Wan-14B 720p", 8, 75600, 128, 1 / 4),
    Shape("Wan-14B 720p", 8, 75600, 128, 1 / 8),
    Shape("Wan-14B 720p, local", 8, 75600, 128, 1 / 8, pattern="local"),
    Shape("HunyuanVideo 720p", 6, 119056, 128, 1 / 8),
    Shape("Flux 2048", 24, 16896, 128, 1 / 4),
    Shape("Flux 2048, text", 24, 16896, 128, 0.15, pattern="text"),
    Shape("Flux 2048, text, late first", 24, 16896, 128, 0.15, pattern="text", ordered=True),
    Shape("Flux 1024", 24, 4608, 128, 1 / 4),
    Shape("Flux 1024, text", 24, 4608, 128, 1 / 4, pattern="text"),
    Shape("Flux 1024, text, late first", 24, 4608, 128, 1 / 4, pattern="text", ordered=True),
    # everything that tile-sparse does in a layer
    Shape("Flux 1024, whole method", 24, 4608, 128, 1 / 4, tail=True, method=True),
    Shape("Flux 1536, whole method", 24, 9728, 128, 1 / 4, tail=True, method=True),
    Shape("Wan-1.3B 480p, whole method", 12, 32760, 128, 0.5, tail=True, method=True),
    Shape("Wan-1.3B 480p, whole method", 12, 32760, 128, 0.15, tail=True, method=True),
    Shape("Wan-14B 720p, whole method", 40, 75600, 128, 1 / 8, tail=True, method=True),
    Shape("128k, whole method", 6, 131072, 128, 0.1, tail=True, method=True),
)
TINY = (Shape("tiny", 2, 700, 64, 0.5),
        Shape("tiny, uneven, late first", 2, 700, 64, 0.5, pattern="uneven", ordered=True),
        Shape("tiny, text, late first", 2, 700, 64, 0.5, pattern="text", ordered=True),
        Shape("tiny, tail", 2, 700, 64, 0.5, tail=True),
        Shape("tiny, whole method", 2, 700, 64, 0.5, tail=True, method=True))


def lists(shape: Shape, blocks: int, key_blocks: int, device: str) -> tuple[torch.Tensor, ...]:
    """(indices, counts, keep) of the pattern."""
    kept = max(1, round(shape.density * key_blocks))
    place = torch.rand(1, shape.heads, blocks, key_blocks, device=device)
    if shape.pattern == "local":
        centre = torch.arange(blocks, device=device)[:, None] * (key_blocks / blocks)
        place = (torch.arange(key_blocks, device=device) - centre).abs().expand_as(place)
    counts = torch.full((1, shape.heads, blocks), kept, dtype=torch.int32, device=device)
    if shape.pattern == "uneven":
        spread = (torch.randn(1, shape.heads, blocks, device=device) * 0.8).exp()
        counts = (spread / spread.mean() * kept).round().clamp(1, key_blocks).int()
    if shape.pattern == "text":
        counts[..., :TEXT_BLOCKS] = key_blocks
    rank = place.argsort(dim=-1).argsort(dim=-1)
    keep = rank < counts[..., None]
    number = torch.arange(key_blocks, device=device)
    indices = torch.where(keep, number, key_blocks).sort(dim=-1).values.int()
    return indices.contiguous(), counts, keep


def offsets_of(tokens: int, block: int, device: str) -> torch.Tensor:
    return torch.tensor([*range(0, tokens, block), tokens], dtype=torch.int32, device=device)


def candidates(shape: Shape, device: str, impls: list[str]) -> tuple[dict[str, Run], float, int]:
    """Every way of computing this shape, the density of the sparse ones, the bytes of their lists.
    """
    dtype = DTYPES[device]
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, shape.tokens, shape.heads, shape.dim, device=device, dtype=dtype,
                           generator=g) for _ in range(3))
    runs: dict[str, Run] = {}

    for kernel in kernels(device):
        if kernel not in ("default", "math") or device == "cpu":
            runs[f"dense {kernel}"] = dense_call(kernel, q, k, v)
    block = 128
    q_offsets, k_offsets = (offsets_of(shape.tokens, n, device) for n in (block, shape.block_k))
    blocks, key_blocks = len(q_offsets) - 1, len(k_offsets) - 1
    if shape.method:
        order = torch.randperm(shape.tokens, generator=g, device=device)
        none = torch.zeros(blocks, dtype=torch.bool, device=device)

        def whole(impl: str) -> Run:
            def run() -> Any:
                t = tile_gather(q, k, v, order, q_offsets, block=block)
                found = tile_select(t.query, t.key_mean, q_offsets, none, none,
                                    density=shape.density, each_row=True)
                out = block_sparse_attention(
                    *t[:3], found.indices, found.counts, q_offsets, q_offsets, block_q=block,
                    block_k=block, tail=(*t[3:], found.keep), impl=impl)
                assert isinstance(out, torch.Tensor)
                return out.index_select(1, order)

            return run

        runs |= {f"tile-sparse, {impl}": whole(impl) for impl in impls}

        def selection() -> Any:
            return tile_select(q, k_mean, q_offsets, none, none, density=shape.density,
                               each_row=True)

        k_mean = tile_gather(q, k, v, order, q_offsets, block=block).key_mean
        runs["selection alone"] = selection
        return runs, shape.density, 0
    indices, counts, keep = lists(shape, blocks, key_blocks, device)
    share = k_offsets.diff().float() / shape.tokens
    rows = q_offsets.diff().float() / shape.tokens
    density = float(((keep.float() @ share) @ rows).mean())
    tail = None
    if shape.tail:
        identity = torch.arange(shape.tokens, device=device)
        t = tile_gather(q, k, v, identity, k_offsets, block=shape.block_k)
        tail = (*t[3:], keep)

    workers = 1
    if device == "cuda":
        workers = torch.cuda.get_device_properties(device).multi_processor_count
    known = late_first(counts, workers) if shape.ordered and shape.pattern == "text" else None

    def sparse(impl: str) -> Run:
        def run() -> Any:
            found = known
            if shape.ordered and known is None:
                found = late_first(counts, workers)
            return block_sparse_attention(
                q, k, v, indices, counts, q_offsets, k_offsets, block_q=block,
                block_k=shape.block_k, tail=tail, order=found, impl=impl)

        return run

    runs |= {impl: sparse(impl) for impl in impls}
    if shape.flex and device == "cuda":
        runs["FlexAttention"] = flex(q, k, v, indices, counts)
    given = (indices, counts, q_offsets, k_offsets, known, *(tail or ()))
    return runs, density, sum(x.nbytes for x in given if x is not None)


def flex(q: Any, k: Any, v: Any, indices: Any, counts: Any) -> Run:
    """torch's FlexAttention with the same blocks, its mask made beforehand."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = BlockMask.from_kv_blocks(counts, indices, counts, indices, BLOCK_SIZE=128,
                                    seq_lengths=(q.shape[1], k.shape[1]))
    compiled = torch.compile(flex_attention, dynamic=False)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: compiled(*heads, block_mask=mask)


def peak_bytes(run: Run) -> int:
    """At most how much a call adds to the memory of the device."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, rounds: int, device: str, impls: list[str]) -> list[dict[str, Any]]:
    runs, density, lists_bytes = candidates(shape, device, impls)
    base = {**shape._asdict(), "density": density}
    rows, times = tried(runs, rounds, device, base)
    best = min(record.spread(times[name])["seconds"] for name in times if name.startswith("dense"))
    for name, found in times.items():
        row = {**base, "what": name, **record.spread(found)}
        if name.startswith("dense"):
            row["tflops"] = 4 * shape.heads * shape.tokens**2 * shape.dim / row["seconds"] / 1e12
        elif name == "selection alone":
            row["share_of_best_dense"] = row["seconds"] / best
        else:
            row["speedup"] = best / row["seconds"]
            row["efficiency"] = best * density / row["seconds"]
        if device == "cuda":
            row["bytes"] = peak_bytes(runs[name]) + lists_bytes * (name in impls)
            of_each = shape.heads * shape.tokens * shape.dim * DTYPES[device].itemsize
            row["given_bytes"] = 3 * of_each
        if device == "cuda" and shape.tokens < 10_000:
            row["host_microseconds"] = host_microseconds(runs[name])
        rows.append(row)
    return rows


def told(row: dict[str, Any]) -> str:
    where = f"{row['name']:<28} {row['density']:<7.4f} {row['what']:<22}"
    if "failed" in row:
        return f"{where} FAILED {row['failed']}"
    more = f"E {row['efficiency']:.3f}  {row['speedup']:.2f}x" if "efficiency" in row else ""
    host = f"  host {row['host_microseconds']:.0f} us" if "host_microseconds" in row else ""
    return f"{where} {row['seconds'] * 1e3:9.3f} ms  {more}{host}"


def main(
    words: list[str] | None = None, bar: Callable[[str, int, int], None] = lambda *_: None,
    say: Callable[[str], None] = print,
) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--impl", nargs="*", help="default: all that can run here")
    parser.add_argument("--tiny", action="store_true", help="small shapes, any device")
    parser.add_argument("--only", help="part of a shape's name")
    parser.add_argument("--output", "-o", type=Path, default=record.RESULTS)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("no CUDA device; --tiny runs small shapes here")
    dtype = DTYPES[device]
    usable = implementations(device, dtype, 128)
    impls = args.impl or [name for name in ("gluon", "triton", "torch")
                          if not usable[name] and (name != "torch" or device == "cpu")]
    shapes = [s for s in (TINY if args.tiny else SHAPES) if (args.only or "") in s.name]
    if not shapes:
        parser.error(f"no shape has {args.only!r} in its name")
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"rounds": args.rounds, "dtype": str(dtype), "clocks": [clocks()]}
    path = args.output / f"kernels_{device}.json" if not args.output.suffix else args.output
    for i, shape in enumerate(shapes):
        bar(shape.name, i, len(shapes))
        rows += (found := measure(shape, args.rounds, device, impls))
        settings["clocks"].append(clocks())
        record.write(path, "kernels", device, settings, rows)
        for row in found:
            say(told(row))
        if device == "cuda":
            torch.cuda.empty_cache()
    bar("done", len(shapes), len(shapes))
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
