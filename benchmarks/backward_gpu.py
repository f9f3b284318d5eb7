"""The backward of block-sparse attention on a GPU: errors against float64, then times against SDPA.

python benchmarks/backward_gpu.py            # under a minute on one H200
python benchmarks/backward_gpu.py --sweep    # other tile shapes too
python benchmarks/backward_gpu.py --tiny     # a smoke run on any machine, also interpreted
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels"), str(Path(__file__).parent)]

import record  # noqa: E402
from attention_cases import DTYPES, Case  # noqa: E402
from gradient_cases import check_gradients  # noqa: E402

from fastdiff.kernels.block_pool import block_pool  # noqa: E402
from fastdiff.kernels.block_sparse_attention import (  # noqa: E402
    block_sparse_attention,
    implementations,
    triton_backward,
)

# (heads, tokens, head dim, block)
SHAPES = ((12, 32768, 128, 128), (12, 32768, 64, 128), (24, 4608, 128, 128))
TINY = ((2, 192, 16, 32),)
DENSITIES = (0.5, 0.25, 0.125)
# (padded head dim, what, (BM, BN, warps, stages))
SWEEP = (
    (128, "QUERY_CONFIGS", (64, 64, 4, 2)),
    (128, "QUERY_CONFIGS", (64, 128, 8, 2)),
    (128, "QUERY_CONFIGS", (128, 32, 8, 2)),
    (128, "QUERY_CONFIGS", (128, 64, 8, 3)),
    (128, "KEY_CONFIGS", (32, 128, 8, 2)),
    (128, "KEY_CONFIGS", (64, 64, 8, 2)),
    (128, "KEY_CONFIGS", (64, 64, 4, 2)),
    (128, "KEY_CONFIGS", (64, 128, 8, 1)),
    (64, "QUERY_CONFIGS", (64, 64, 4, 3)),
    (64, "QUERY_CONFIGS", (128, 128, 8, 2)),
    (64, "QUERY_CONFIGS", (128, 64, 4, 2)),
    (64, "KEY_CONFIGS", (64, 64, 4, 2)),
    (64, "KEY_CONFIGS", (64, 64, 4, 3)),
    (64, "KEY_CONFIGS", (64, 128, 8, 3)),
)


def error_groups(tiny: bool) -> list[list[Case]]:
    """Groups of cases that share their compiled kernels; every option in each head dim."""
    if tiny:
        return [[Case(1, 2, 1, 19, 27, 16, 16, 16, t, True, tail=True)] for t in DTYPES]
    groups = []
    for i, dim in enumerate((64, 72, 80, 96, 128, 256, 64, 128)):
        dtype = torch.bfloat16 if i < 6 else (torch.float16, torch.float32)[i - 6]
        ragged, masked = i % 2 == 1, i % 3 == 1
        group = []
        for seed in range(4):
            block = (128, 64)[i % 2]
            size = block * (2 + seed) + ragged * (37 * seed + 5)
            case = Case(1 + seed % 2, 4, 2, size, size + block, dim, block, block, dtype, ragged,
                        masked, True, strided=seed == 1, seed=10 * i + seed)
            group.append(case)
        groups.append(group)
    return groups


def run_errors(group: list[Case], device: str, impl: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for case in group:
        row: dict[str, Any] = {"kind": "error", "case": repr(case), "impl": impl}
        try:
            # the largest error of each gradient as a share of what is allowed
            row["shares"] = check_gradients(case.build(device), impl)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def problem(shape: tuple[int, ...], density: float, tail: bool, device: str) -> dict[str, Any]:
    """Random tensors and, in every row, the same number of random key blocks."""
    heads, tokens, dim, block = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    new = {"device": device, "dtype": dtype}
    q, k, v = (torch.randn(1, tokens, heads, dim, **new).requires_grad_() for _ in range(3))
    offsets = torch.arange(0, tokens + 1, block, dtype=torch.int32, device=device)
    blocks = len(offsets) - 1
    kept = max(1, round(density * blocks))
    chosen = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)[..., :kept].sort(-1)[0]
    keep = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool, device=device)
    keep.scatter_(-1, chosen, True)
    args: dict[str, Any] = {
        "query": q, "key": k, "value": v, "indices": chosen.int(),
        "counts": torch.full((1, heads, blocks), kept, dtype=torch.int32, device=device),
        "query_offsets": offsets, "key_offsets": offsets, "block_q": block, "block_k": block}
    if tail:
        means = [block_pool(x.detach(), offsets, block=block) for x in (k, v)]
        leaves = [mean.requires_grad_() for mean, _ in means]
        args["tail"] = (*leaves, means[0][1], keep)
    return args


def backward_of(out: Tensor, leaves: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def leaves_of(args: dict[str, Any]) -> list[Tensor]:
    return [args["query"], args["key"], args["value"], *args.get("tail", ())[:2]]


def sparse(args: dict[str, Any], impl: str) -> Callable[[], Any]:
    out: Any = block_sparse_attention(**args, impl=impl)
    return backward_of(out, leaves_of(args), torch.randn_like(out))


def dense(args: dict[str, Any], backend: SDPBackend) -> Callable[[], Any]:
    leaves = [args[name] for name in ("query", "key", "value")]
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
    return backward_of(out, leaves, torch.randn_like(out))


def agreement(shape: tuple[int, ...], device: str, impl: str) -> dict[str, Any]:
    """All blocks kept, so that dense attention has the same gradients; RMS of the difference."""
    args = problem(shape, 1.0, False, device)
    kind = SDPBackend.FLASH_ATTENTION if device == "cuda" else SDPBackend.MATH
    torch.manual_seed(3)
    found = sparse(args, impl)()
    torch.manual_seed(3)
    q, k, v = (args[name] for name in ("query", "key", "value"))
    with sdpa_kernel([kind]):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    grad = torch.randn(q.shape, device=device, dtype=q.dtype).transpose(1, 2)
    wanted = torch.autograd.grad(out, (q, k, v), grad)
    rms = [((x - y).float().norm() / y.float().norm()).item()
           for x, y in zip(found, wanted, strict=True)]
    row = {"kind": "agree", "shape": list(shape), "rms": dict(zip("qkv", rms, strict=True))}
    # two roundings to bfloat16 of 0.2 % each, on both sides
    return row | ({"failed": f"differs from dense by {max(rms):.3g}"} if max(rms) > 0.02 else {})


def compile_timed(task: tuple[Any, ...], device: str, impl: str) -> None:
    """Fill the kernel cache with what a timed run will need."""
    shape, tail, change = task
    with changed(change, shape[2]):
        sparse(problem((2, 4 * shape[3], *shape[2:]), 0.5, tail, device), impl)()


class changed:
    """Another tile shape in the table of one of the kernels, for a while."""

    def __init__(self, change: tuple[str, tuple[int, ...]] | None, dim: int) -> None:
        self.change, self.place = change, (dim, False)

    def __enter__(self) -> None:
        if self.change is not None:
            table = getattr(triton_backward, self.change[0])
            self.before = table[self.place]
            table[self.place] = self.change[1]

    def __exit__(self, *_: Any) -> None:
        if self.change is not None:
            getattr(triton_backward, self.change[0])[self.place] = self.before


def seconds(run: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def parts(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds on the device of each kind of kernel of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in found.key_averages():
        kind = next((n for n in ("dq", "dkv", "tail") if f"_bwd_{n}_kernel" in event.key), "rest")
        total[kind] = total.get(kind, 0.0) + event.self_device_time_total / 1e6
    return total


def time_shape(
    shape: tuple[int, ...], device: str, impl: str, rounds: int, sweep: bool
) -> list[dict[str, Any]]:
    """Backward alone, every candidate once a round so that all share the clocks."""
    heads, tokens, dim, block = shape
    base = {"kind": "time", "heads": heads, "tokens": tokens, "head_dim": dim, "block": block}
    rows: list[dict[str, Any]] = []
    runs: list[tuple[dict[str, Any], Callable[[], Any], Any]] = []

    def add(make: Callable[[], Callable[[], Any]], change: Any = None, **facts: Any) -> None:
        try:
            with changed(change, dim):
                run = make()
                run()
        except Exception as error:
            rows.append(base | facts | {"failed": f"{type(error).__name__}: {error}"[:300]})
            return
        runs.append((base | facts, run, change))

    args = problem(shape, 1.0, False, device)
    gpu = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    for backend in gpu if device == "cuda" else (SDPBackend.MATH,):
        name = f"dense {backend.name.split('_')[0].lower()}"
        add(lambda b=backend: dense(args, b), what=name, density=1.0, tail=False)
    candidates: list[tuple[float, bool, Any]] = [
        (d, t, None) for d, t in itertools.product(DENSITIES, (False, True))]
    if sweep:
        candidates += [(0.25, False, (table, c)) for width, table, c in SWEEP if width == dim]
    for density, tail, change in candidates:
        made = problem(shape, density, tail, device)
        real = made["counts"].sum().item() / made["indices"].shape[2] ** 2 / heads
        facts = {"config": list(change)} if change else {}
        add(lambda m=made: sparse(m, impl), change, what="sparse", density=real, tail=tail, **facts)

    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for i, (_, run, change) in enumerate(runs):
            with changed(change, dim):
                times[i].append(seconds(run, device))
    for (row, run, _), found in zip(runs, times, strict=True):
        row |= record.spread(found)
        # five products of 2 S^2 D operations each
        row["tflops"] = 10 * heads * tokens**2 * dim * row["density"] / row["seconds"] / 1e12
        if row["what"] == "sparse" and device == "cuda" and "config" not in row:
            row["parts"] = parts(run)
        rows.append(row)
    best = min((r["seconds"] for r in rows if "seconds" in r and r["what"] != "sparse"), default=0)
    for row in rows:
        if "seconds" in row:
            row["speedup"] = best / row["seconds"]
            row["efficiency"] = best * row["density"] / row["seconds"]
    return rows


def show(row: dict[str, Any]) -> None:
    if row["kind"] == "agree":
        print(f"{row['shape']} all kept, against dense: {row['rms']} {row.get('failed', '')}")
        return
    if row["kind"] == "error":
        told = row.get("failed") or f"at most {max(row['shares'].values()):.2f} of the bound"
        print(f"{told}  {row['case']}")
        return
    place = (f"{row['heads']} x {row['tokens']} x {row['head_dim']} {row['what']} "
             f"{row['density']:.3f} {'tail' if row['tail'] else ''} {row.get('config', '')}")
    if "failed" in row:
        print(f"{place} FAILED {row['failed']}")
        return
    spent = " ".join(f"{k} {v * 1e3:.2f}" for k, v in row.get("parts", {}).items())
    print(f"{place:<70} {row['seconds'] * 1e3:8.3f} ms {row['tflops']:6.1f} TFLOP/s "
          f"x{row['speedup']:5.2f} E {row['efficiency']:.2f} {spent}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few and small, any device")
    parser.add_argument("--sweep", action="store_true", help="other tile shapes at density 0.25")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("no CUDA device; --tiny runs a smoke test here")
    usable = implementations(device, torch.float32, 16)
    checked = "torch" if usable["triton"] else "triton"
    timed = "auto" if device == "cuda" else checked
    shapes = TINY if args.tiny else SHAPES
    groups = error_groups(args.tiny)
    if device == "cuda":
        tasks = [(s, t, None) for s, t in itertools.product(shapes[:2], (False, True))]
        if args.sweep:
            tasks += [((0, 0, dim, 128), False, (table, c)) for dim, table, c in SWEEP]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            waiting = [pool.submit(compile_timed, task, device, timed) for task in tasks]
            errors = [pool.submit(run_errors, group, device, checked) for group in groups]
            # the forward that `auto` takes, in the head dims it is made for
            errors += [pool.submit(run_errors, groups[i], device, "auto") for i in (0, 4)]
            rows = [row for future in errors for row in future.result()]
            for future in waiting:
                if error := future.exception():
                    print(f"not compiled ahead: {error}")
    else:
        rows = [row for group in groups for row in run_errors(group, device, checked)]
    for row in rows:
        show(row)
    for shape in shapes:
        found = [agreement(shape, device, timed)]
        found += time_shape(shape, device, timed, 2 if args.tiny else args.rounds, args.sweep)
        rows += found
        for row in found:
            show(row)
    suffix = "_tiny" if args.tiny else ""
    path = args.output or record.RESULTS / f"backward_{device}{suffix}.json"
    settings = {"rounds": args.rounds, "sweep": args.sweep, "errors_of": checked, "timed": timed}
    record.write(path, "backward_gpu", device, settings, rows)
    failed = sum("failed" in row for row in rows)
    print(f"{len(rows)} rows, {failed} failed: {path}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
