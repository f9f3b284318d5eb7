"""Kernels on a GPU: errors over random cases, then times interleaved with the best dense SDPA."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from attention_cases import DTYPES, HEAD_DIMS, Case, check  # noqa: E402

from fastdiff.kernels.block_pool import block_pool  # noqa: E402
from fastdiff.kernels.block_sparse_attention import (  # noqa: E402
    block_sparse_attention,
    implementations,
    triton_impl,
)

# (heads, tokens, head dim, block)
SHAPES = ((12, 32760, 128, 128), (24, 4608, 128, 128), (12, 32768, 64, 128), (6, 8192, 64, 64))
DENSITIES = (0.5, 0.25, 0.125, 0.1)
# other tiles worth knowing, at density 0.25: (padded head dim, (BM, BN, warps, stages))
SWEEP = (
    (128, (128, 128, 8, 2)),
    (128, (64, 64, 4, 3)),
    (128, (128, 64, 8, 2)),
    (64, (128, 64, 4, 3)),
    (64, (64, 64, 4, 3)),
    (64, (64, 128, 4, 3)),
    (64, (128, 128, 8, 3)),
)


def error_cases(quick: bool) -> list[list[Case]]:
    """Groups of cases that share one compiled kernel."""
    flags = ((0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 1))
    groups = []
    for i, (dim, dtype, flag) in enumerate(itertools.product(HEAD_DIMS, DTYPES, flags)):
        block_q, block_k = ((128, 128), (64, 64), (48, 96))[i // len(flags) % 3]
        ragged, masked, tail = map(bool, flag)
        group = []
        for seed in range(3):
            queries, keys = (n * (2 + seed) for n in (block_q, block_k))
            if ragged:
                queries, keys = queries + 37 * seed + 5, keys + 53 * seed + 11
            group.append(
                Case(
                    1 + seed % 2, 4, 2, queries, keys, dim, block_q, block_k,
                    dtype, ragged, masked, tail, strided=seed == 1, seed=i * 3 + seed,
                )
            )  # fmt: skip
        groups.append(group)
    if quick:
        groups = [[Case(1, 2, 1, 40, 50, 40, 16, 16, t, True, tail=True)] for t in DTYPES]
    return groups


def run_errors(group: list[Case], device: str, impl: str) -> list[dict]:
    torch.set_num_threads(1)
    rows = []
    for case in group:
        row = {"case": repr(case)} | {
            "head_dim": case.dim,
            "dtype": str(case.dtype)[6:],
            "ragged": case.ragged,
            "masked": case.masked,
            "tail": case.tail,
        }
        try:
            row["error"], row["allowed"] = check(case.build(device), impl)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def window_order(blocks: int, device: str) -> torch.Tensor:
    """For every block, all blocks by distance on a 3-D grid of tiles, [blocks, blocks]."""
    number = torch.arange(blocks, device=device)
    side = max(1, round(blocks ** (1 / 3)))
    place = torch.stack((number // (side * side), number // side % side, number % side), -1)
    return torch.cdist(place.float(), place.float()).argsort(dim=-1, stable=True)


def lists(pattern: str, heads: int, blocks: int, kept: int, device: str) -> tuple:
    if pattern == "window":
        chosen = window_order(blocks, device)[:, :kept].expand(1, heads, blocks, kept)
    else:
        chosen = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)[..., :kept]
    chosen = chosen.sort(-1).values
    counts = torch.full((1, heads, blocks), kept, dtype=torch.int32, device=device)
    keep = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool, device=device)
    return chosen.int().contiguous(), counts, keep.scatter_(-1, chosen, True)


def offsets_of(tokens: int, block: int, device: str) -> torch.Tensor:
    return torch.tensor([*range(0, tokens, block), tokens], dtype=torch.int32, device=device)


def dense(backend: SDPBackend, q, k, v):
    def run():
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    return run


def problem(heads: int, tokens: int, dim: int, block: int) -> tuple:
    q, k, v = (torch.randn(1, tokens, heads, dim, device="cuda").bfloat16() for _ in range(3))
    offsets = offsets_of(tokens, block, "cuda")
    k_mean, weight = block_pool(k, offsets, block=block)
    v_mean, _ = block_pool(v, offsets, block=block)
    return q, k, v, offsets, (k_mean, v_mean, weight)


def sparse(q, k, v, offsets, block, chosen, counts, tail=None):
    return lambda: block_sparse_attention(
        q, k, v, chosen, counts, offsets, offsets,
        block_q=block, block_k=block, tail=tail, impl="triton",
    )  # fmt: skip


def compile_timed(task: tuple) -> None:
    """Fill the kernel cache with what a timed run will need."""
    shape, config, with_tail = task
    default = triton_impl.CONFIGS[shape[2], False]
    q, k, v, offsets, pooled = problem(*shape)
    chosen, counts, keep = lists("window", shape[0], len(offsets) - 1, 2, "cuda")
    tail = (*pooled, keep) if with_tail else None
    # the process runs error cases too, which are for the table as it ships
    triton_impl.CONFIGS[shape[2], False] = config or default
    try:
        sparse(q, k, v, offsets, shape[3], chosen, counts, tail)()
        torch.cuda.synchronize()
    finally:
        triton_impl.CONFIGS[shape[2], False] = default


def interleaved(candidates: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate, one call of each per round so that all share the clocks."""
    for run in candidates.values():
        run()
    events = {
        name: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for name in candidates
    }
    for i in range(rounds):
        for name, run in candidates.items():
            events[name][i][0].record()
            run()
            events[name][i][1].record()
    torch.cuda.synchronize()
    return {
        name: sorted(start.elapsed_time(end) / 1e3 for start, end in pairs)
        for name, pairs in events.items()
    }


def spread(found: list[float]) -> dict[str, float]:
    middle, p20, p80 = (found[int(len(found) * x)] for x in (0.5, 0.2, 0.8))
    return {"seconds": middle, "p20": p20, "p80": p80}


def spot_error(run, q, k, v, offsets, chosen) -> float:
    """Largest error of four query blocks against float32 attention over their listed keys."""
    out = run()
    worst = 0.0
    for head, block in ((0, 0), (1, -1), (q.shape[2] - 1, 3), (2, len(offsets) // 2)):
        block = block % (len(offsets) - 1)
        rows = slice(int(offsets[block]), int(offsets[block + 1]))
        parts = [torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in chosen[0, head, block]]
        keys = torch.cat(parts).cuda()
        with sdpa_kernel([SDPBackend.MATH]):
            wanted = F.scaled_dot_product_attention(
                q[:, rows, head].float(), k[:, keys, head].float(), v[:, keys, head].float()
            )
        worst = max(worst, (out[:, rows, head].float() - wanted).abs().max().item())
    return worst


def time_shape(shape: tuple, rounds: int, sweep: bool) -> list[dict]:
    heads, tokens, dim, block = shape
    q, k, v, offsets, pooled = problem(*shape)
    blocks = len(offsets) - 1
    lengths = offsets.diff().double()
    base = {"batch": 1, "heads": heads, "tokens": tokens, "head_dim": dim, "block": block}
    base["dtype"] = "bfloat16"
    candidates, facts, failed = {}, {}, []

    def add(name: str, run, **fact) -> None:
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            failed.append(base | fact | {"name": name, "failed": reason})
            return
        candidates[name], facts[name] = run, fact

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        add(f"dense {backend.name.split('_')[0].lower()}", dense(backend, q, k, v), density=1.0)
    configs = [(None, p, d, t) for p in ("random", "window") for d in DENSITIES for t in (0, 1)]
    if sweep:
        configs += [(c, "random", 0.25, t) for width, c in SWEEP if width == dim for t in (0, 1)]
    default = triton_impl.CONFIGS[dim, False]
    for config, pattern, density, with_tail in configs:
        kept = max(1, round(density * blocks))
        chosen, counts, keep = lists(pattern, heads, blocks, kept, "cuda")
        pairs = lengths @ keep[0].double().mean(0) @ lengths
        tail = (*pooled, keep) if with_tail else None
        run = sparse(q, k, v, offsets, block, chosen, counts, tail)

        def with_config(run=run, config=config):
            triton_impl.CONFIGS[dim, False] = config or default
            return run()

        fact = {"pattern": pattern, "density": float(pairs) / tokens**2, "tail": bool(with_tail)}
        fact["config"] = list(config or default)
        name = f"sparse {pattern} {density} {'tail' if with_tail else ''} {config or ''}"
        add(name, with_config, **fact)
        if not with_tail and name in candidates:
            fact["error"] = spot_error(with_config, q, k, v, offsets, chosen)
    pool = lambda: block_pool(k, offsets, block=block, impl="triton")  # noqa: E731
    add("block_pool", pool)

    times = interleaved(candidates, rounds)
    triton_impl.CONFIGS[dim, False] = default
    best = min(spread(times[name])["seconds"] for name in times if name.startswith("dense"))
    rows = []
    for name, found in times.items():
        row = base | facts[name] | {"name": name.strip(), "rounds": rounds} | spread(found)
        if name == "block_pool":
            row["gigabytes_per_second"] = q.numel() * 2 / row["seconds"] / 1e9
        else:
            flops = 4 * heads * tokens * tokens * dim * row["density"]
            row["tflops"] = flops / row["seconds"] / 1e12
            row["speedup"] = best / row["seconds"]
            row["efficiency"] = best * row["density"] / row["seconds"]
        rows.append(row)
    return rows + failed


def show(rows: list[dict]) -> None:
    for row in rows:
        place = f"H{row['heads']} S{row['tokens']} D{row['head_dim']} {row['name']:<44}"
        if "failed" in row:
            print(f"{place} FAILED {row['failed']}")
        elif "tflops" in row:
            error = f" err {row['error']:.4f}" if "error" in row else ""
            print(
                f"{place} {row['seconds'] * 1e3:8.3f} ms {row['tflops']:6.0f} TFLOP/s "
                f"x{row['speedup']:5.2f} E {row['efficiency']:.2f}{error}"
            )
        else:
            print(f"{place} {row['seconds'] * 1e3:8.3f} ms {row['gigabytes_per_second']:.0f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, no timing, any device")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-sweep", action="store_true", help="skip the other tile shapes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kernels_gpu.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        parser.error("no CUDA device; --quick runs the smoke test here")
    reasons = implementations(device, torch.float32, 64)
    impl = "torch" if reasons["triton"] else "triton"
    began = time.perf_counter()
    result = {
        "benchmark": "kernels_gpu",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "impl": impl,
        "errors": [],
        "rows": [],
    }
    if impl == "triton":
        import triton

        result["versions"]["triton"] = triton.__version__

    def save() -> None:
        result["elapsed"] = round(time.perf_counter() - began, 1)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = args.output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, args.output)

    groups = error_cases(args.quick)
    if args.quick:
        found = [run_errors(group, device, impl) for group in groups]
    else:
        # compiling dominates, so the cases run in processes that share triton's disk cache
        timed = [(shape, None, tail) for shape in SHAPES for tail in (False, True)]
        if not args.no_sweep:
            swept = {shape[2]: shape for shape in (SHAPES[0], SHAPES[2])}
            timed += [(swept[d], c, tail) for d, c in SWEEP for tail in (False, True)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            warm = [pool.submit(compile_timed, task) for task in timed]
            futures = [pool.submit(run_errors, group, device, impl) for group in groups]
            found = [future.result() for future in futures]
            for task, future in zip(timed, warm, strict=True):
                if future.exception():
                    print(f"compile failed for {task}: {future.exception()}"[:300])
    result["errors"] = [row for group in found for row in group]
    save()
    red = [row for row in result["errors"] if "failed" in row]
    print(f"{impl} on {result['device']}: {len(result['errors'])} cases, {len(red)} failed")
    for dtype in dict.fromkeys(row["dtype"] for row in result["errors"]):
        good = [r for r in result["errors"] if r["dtype"] == dtype and "failed" not in r]
        if good:
            worst = max(good, key=lambda row: row["error"])
            print(f"  {dtype}: largest error {worst['error']:.2e}, allowed {worst['allowed']:.2e}")
    for row in red[:8]:
        print("  FAILED", row["case"], row["failed"])
    print(f"  {result['elapsed']} s", flush=True)
    if not args.quick:
        for shape in SHAPES:
            sweep = not args.no_sweep and shape in (SHAPES[0], SHAPES[2])
            rows = time_shape(shape, args.rounds, sweep)
            result["rows"] += rows
            save()
            show(rows)
            torch.cuda.empty_cache()
        print(f"{result['elapsed']} s in all")
    if red:
        # a time measured on a wrong kernel is no result
        sys.exit(1)


if __name__ == "__main__":
    main()
