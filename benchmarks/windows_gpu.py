"""Exact per-token windows: right on this GPU, then against dense attention, interleaved.

All candidates of a shape run in turn, round after round, so that they share the card's clocks.
E is the best dense time, times the density of the windows themselves, over the time: what a tile
computes beyond its windows counts as waste. `covered` is that share, `masked` that of its tiles.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "kernels")]

import record  # noqa: E402
from dense_kernels import dense_call, kernels  # noqa: E402
from timing import Run, clocks, tried  # noqa: E402
from window_cases import Case, check  # noqa: E402

from fastdiff.kernels.window_attention import (  # noqa: E402
    Window,
    implementations,
    window_attention,
)
from fastdiff.kernels.window_attention.geometry import bounds, boxes  # noqa: E402

Grid = tuple[int, int, int]
# rows and keys of a tile, where they are known without the kernel
TILES = {"gluon": (128, 128), "triton": (64, 64)}


class Shape(NamedTuple):
    """One comparison; `text` tokens follow the grid."""

    name: str
    heads: int
    grid: Grid
    window: Grid
    stride: Grid = (1, 1, 1)
    dim: int = 128
    text: int = 0
    flex: bool = False


SHAPES = (
    Shape("HunyuanVideo 720p", 3, (30, 48, 80), (18, 24, 24)),
    Shape("HunyuanVideo 720p, stride 2", 3, (30, 48, 80), (18, 24, 24), (2, 2, 2)),
    Shape("HunyuanVideo 720p, whole tiles", 3, (30, 48, 80), (18, 24, 24), (16, 8, 8)),
    Shape("HunyuanVideo 720p, text", 3, (30, 48, 80), (18, 24, 24), text=256),
    Shape("Wan-14B 720p", 5, (21, 45, 80), (11, 23, 23)),
    Shape("Wan-1.3B 480p", 12, (21, 30, 52), (13, 15, 27)),
    Shape("cube", 12, (32, 32, 32), (17, 17, 17)),
    Shape("Flux 2048", 24, (1, 128, 128), (1, 48, 48), text=512),
    Shape("SDXL, D=64", 20, (1, 96, 96), (1, 33, 33), dim=64),
    # last: its mask and kernel take long to compile
    Shape("HunyuanVideo 720p, beside flex", 3, (30, 48, 80), (18, 24, 24), flex=True),
)
TINY = (Shape("tiny", 2, (3, 9, 11), (2, 5, 5), dim=64, text=7),)


def cases(tiny: bool) -> list[Case]:
    """Odd sizes, strides, causal axes, text, masks; each alone and together."""
    half = (torch.bfloat16, torch.float16)
    found = [
        Case((5, 6, 7), (3, 3, 5), dtype=torch.float16),
        Case((5, 7, 9), (3, 4, 5), (1, 2, 3), "t", 3, 5, batch=2, heads=2, kv_heads=1, dim=40,
             dtype=torch.float16, masked=True),
        Case((1, 1, 50), (1, 1, 11), (1, 1, 4), before=7, dim=128, dtype=torch.bfloat16),
    ]
    if tiny:
        return found
    sizes = [((9, 13, 21), (5, 7, 8)), ((4, 16, 16), (4, 8, 8)), ((1, 37, 41), (1, 12, 41)),
             ((1, 1, 1000), (1, 1, 129)), ((17, 9, 10), (1, 9, 2)), ((2, 2, 2), (1, 2, 1)),
             ((8, 24, 24), (5, 11, 13))]
    for i, (dim, (grid, window)) in enumerate(itertools.product((64, 80, 128), sizes)):
        stride = ((1, 1, 1), tuple(max(1, n // 2) for n in window), tuple(window))[i % 3]
        found.append(Case(
            grid, window, (stride[0], stride[1], stride[2]), ("", "t", "hw", "thw")[i % 4],
            (0, 0, 3, 130)[i % 4], (0, 77, 0, 1)[i // 4 % 4], batch=1 + i % 2,
            heads=2 + 2 * (i % 2), kv_heads=2, dim=dim, dtype=half[i // 2 % 2],
            masked=i % 5 == 4, strided=i % 7 > 4, seed=i))
    for i, dim in enumerate((16, 72, 160, 256)):
        found.append(Case((5, 11, 13), (3, 5, 6), dim=dim, dtype=half[i % 2], after=9, seed=i))
        found.append(Case((5, 11, 13), (3, 5, 6), dim=dim, before=9, seed=i))
    return found


def refusals(device: str) -> dict[str, str | None]:
    """Why an implementation cannot run here; found in processes, since a faulty kernel may hang."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tasks = {impl: pool.apply_async(refusal_here, (impl, device)) for impl in TILES}
        found = {}
        for impl, task in tasks.items():
            try:
                found[impl] = task.get(60)
            except multiprocessing.TimeoutError:
                found[impl] = "no answer in 60 s"
        return found


def refusal_here(impl: str, device: str) -> str | None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.zeros(1, 1, 1, 128, dtype=dtype, device=device)
    return "; ".join(implementations(x, x, x)[impl]) or None


def one_case(impl: str, device: str, case: Case) -> tuple[float, str] | None:
    """(error over what is allowed, what went wrong), or None where `impl` refuses."""
    torch.set_num_threads(1)
    args = case.build(device)
    if implementations(args["query"], args["key"], args["value"])[impl]:
        return None
    try:
        error, allowed = check(case, device, impl)
        return record.share(error, allowed), ""
    except Exception as wrong:  # every kind of failure is a result here
        return math.nan, f"{case!r}: {type(wrong).__name__}: {wrong}"[:400]


def compiled(impl: str, device: str, shape: Shape) -> None:
    """Leave the kernel of a shape in triton's cache."""
    candidates(shape, device, [impl])[impl]()
    if device == "cuda":
        torch.cuda.synchronize()


def checked(
    impls: list[str], device: str, tiny: bool, shapes: list[Shape], workers: int, seconds: float
) -> list[dict[str, Any]]:
    """All cases, in processes: many kernels are compiled, and a faulty one must not end all."""
    end = time.perf_counter() + seconds
    rows = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        tasks = {impl: [pool.apply_async(one_case, (impl, device, case)) for case in cases(tiny)]
                 for impl in impls}
        for impl, shape in itertools.product(impls, shapes):
            pool.apply_async(compiled, (impl, device, shape))
        for impl, running in tasks.items():
            found, late = [], 0
            for task in running:
                try:
                    found.append(task.get(max(end - time.perf_counter(), 0.1)))
                except multiprocessing.TimeoutError:
                    late += 1
            ran = [row for row in found if row is not None]
            failed = [wrong for _, wrong in ran if wrong]
            failed += [f"{late} cases did not end in {seconds:g} s"] * (late > 0)
            worst = max((ratio for ratio, wrong in ran if not wrong), default=math.nan)
            rows.append({
                "what": impl, "cases": len(ran) + late, "failed": len(failed),
                "refused": found.count(None), "worst_error_over_allowed": worst,
                "reasons": failed[:8]})
            print({k: v for k, v in rows[-1].items() if k != "reasons"}, *failed[:4], sep="\n  ",
                  flush=True)
        pool.close()
        if not any(row["failed"] for row in rows):
            pool.join()
    return rows


def candidates(shape: Shape, device: str, impls: list[str]) -> dict[str, Run]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)
    tokens = math.prod(shape.grid) + shape.text
    q, k, v = (torch.randn(1, tokens, shape.heads, shape.dim, device=device, dtype=dtype,
                           generator=g) for _ in range(3))

    def windows(impl: str) -> Run:
        return lambda: window_attention(q, k, v, grid=shape.grid, window=shape.window,
                                        stride=shape.stride, impl=impl)

    # the best dense kernel of large shapes is cuDNN's or flash-attn-4's: docs/kernels.md
    names = [n for n in kernels(device) if n in ("cudnn", "flash-attn-4")] or ["default"]
    runs = {f"dense {name}": dense_call(name, q, k, v) for name in names}
    runs |= {impl: windows(impl) for impl in impls}
    if shape.flex and device == "cuda":
        runs["FlexAttention"] = flex(q, k, v, shape)
    return runs


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> Run:
    """torch's FlexAttention with the same windows in raster order, its mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, height, width = shape.grid
    sides = [torch.tensor(axis, device=q.device)
             for axis in bounds(Window(shape.grid, shape.window, shape.stride))]

    def sees(b: Any, h: Any, row: Any, column: Any) -> Any:
        found = True
        split = [(n // (height * width), n // width % height, n % width) for n in (row, column)]
        for side, i, j in zip(sides, *split, strict=True):
            found = found & (side[0][i] <= j) & (j < side[1][i])
        return found

    heads = [x.transpose(1, 2) for x in (q, k, v)]
    tokens = math.prod(shape.grid)
    compiled = torch.compile(flex_attention, dynamic=False)
    mask: list[Any] = []

    def run() -> Any:
        if not mask:
            mask.append(create_block_mask(sees, None, None, tokens, tokens, device=str(q.device),
                                          _compile=True))
        return compiled(*heads, block_mask=mask[0])

    return run


def measure(shape: Shape, rounds: int, device: str, impls: list[str]) -> list[dict[str, Any]]:
    runs = candidates(shape, device, impls)
    window = Window(shape.grid, shape.window, shape.stride)
    tokens = window.tokens + shape.text
    density = 1 - (window.tokens**2 - window.pairs) / tokens**2
    base = {**shape._asdict(), "density": density}
    rows, times = tried(runs, rounds, device, base)
    dense = [record.spread(times[name])["seconds"] for name in times if name.startswith("dense")]
    for name, found in times.items():
        row = {**base, "what": name, **record.spread(found)}
        if not name.startswith("dense") and dense:
            row["speedup"] = min(dense) / row["seconds"]
            row["efficiency"] = min(dense) * density / row["seconds"]
        if name in TILES and device == "cuda":
            cut = boxes(window, *TILES[name])
            row["covered"] = cut.steps * math.prod(TILES[name]) / window.pairs
            row["masked"] = cut.masked / cut.steps
        rows.append(row)
    return rows


def told(row: dict[str, Any]) -> str:
    where = f"{row['name']:<30} {row['density']:<7.4f} {row['what']:<14}"
    if "failed" in row:
        return f"{where} FAILED {row['failed']}"
    more = f"E {row['efficiency']:.3f}  {row['speedup']:.2f}x" if "efficiency" in row else ""
    cover = f"  covered {row['covered']:.2f}" if "covered" in row else ""
    return f"{where} {row['seconds'] * 1e3:9.3f} ms  {more}{cover}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--impl", nargs="*", help="default: all that can run here")
    parser.add_argument("--tiny", action="store_true", help="small shapes, any device")
    parser.add_argument("--only", help="part of a shape's name")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=90,
                        help="for all cases; and no new shape after that")
    parser.add_argument("--output", "-o", type=Path, default=record.RESULTS)
    args = parser.parse_args(words)
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("no CUDA device; --tiny runs small shapes here")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    usable = refusals(device)
    for name, reason in usable.items():
        if reason:
            print(f"{name}: {reason}")
    impls = args.impl or [name for name in usable if not usable[name]]
    if not impls:
        impls = ["reference"]
    settings: dict[str, Any] = {"rounds": args.rounds, "dtype": str(dtype), "clocks": [clocks()],
                                "cannot": {k: v for k, v in usable.items() if v}}
    path = args.output / f"windows_{device}.json" if not args.output.suffix else args.output
    shapes = [s for s in (TINY if args.tiny else SHAPES) if (args.only or "") in s.name]
    rows = checked(impls, device, args.tiny, shapes, args.workers, args.seconds)
    record.write(path, "windows", device, settings, rows)
    wrong = [row["what"] for row in rows if row["failed"]]
    # no speed of what is wrong
    impls = [name for name in impls if name not in wrong or args.impl]
    for shape in shapes:
        if time.perf_counter() - begin > args.seconds and not args.only:
            print(f"{shape.name}: out of time")
            continue
        rows += (found := measure(shape, args.rounds, device, impls))
        settings["clocks"].append(clocks())
        record.write(path, "windows", device, settings, rows)
        for row in found:
            print(told(row), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {path} after {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
