"""Settings of the two column mass kernels, timed on this GPU: tokens_gpu.py --sweep."""

import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from timing import clocks, interleaved

from fastdiff.kernels.column_mass import column_mass, row_lse, triton_impl

# queries a tile, keys a tile, warps, stages
GRID = [(bm, bn, warps, stages)
        for bm, bn, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4))
        if (bm * bn, warps) not in {(128 * 128, 4), (64 * 64, 8)}]
SHAPES = ((2, 1024, 20, 64), (2, 4096, 20, 64), (2, 16384, 10, 64))
DTYPES = (torch.float16, torch.bfloat16)
TABLES = {"row_lse": triton_impl.LSE, "column_mass": triton_impl.MASS}
KIND = (64, False)
Setting = tuple[int, int, int, int]


def with_setting(kernel: str, setting: Setting, run: Callable[[], Any]) -> Any:
    """Call with this line of the table changed; the kernels look it up at each launch."""
    table, before = TABLES[kernel], TABLES[kernel][KIND]
    table[KIND] = setting
    try:
        return run()
    finally:
        table[KIND] = before


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The two calls by name."""
    generator = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    impl = "triton" if device == "cuda" else "torch"
    lse = row_lse(q, k, impl=impl)
    return {"row_lse": lambda: row_lse(q, k, impl=impl),
            "column_mass": lambda: column_mass(q, k, lse, impl=impl)}


def compiled(job: tuple[str, Setting, torch.dtype]) -> str | None:
    """Fill triton's cache for one setting; the reason where it does not compile."""
    kernel, setting, dtype = job
    try:
        run = problem((2, 256, 20, 64), dtype, "cuda")[kernel]
        with_setting(kernel, setting, run)
        torch.cuda.synchronize()
    except Exception as error:  # a reason to tell, whatever the compiler raised
        return f"{type(error).__name__}: {error}"[:200]
    return None


def sweep(rounds: int, device: str, tiny: bool,
          save: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rows of medians for each kernel, dtype, shape and setting, fastest first."""
    shapes = ((1, 96, 2, 64),) if tiny else SHAPES
    grid, dtypes = (GRID[:2], (torch.float32,)) if tiny else (GRID, DTYPES)
    jobs = [(kernel, setting, dtype)
            for kernel in TABLES for setting in grid for dtype in dtypes]
    begin, refused = time.perf_counter(), {}
    if device == "cuda":
        with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
            found = pool.map(compiled, jobs, chunksize=4)
            refused = {job: reason for job, reason in zip(jobs, found, strict=True) if reason}
        print(f"{len(jobs)} kernels compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    for (kernel, setting, dtype), reason in refused.items():
        print(f"  {kernel} {setting} {dtype}: {reason}", flush=True)
    rows = []
    for dtype, shape, kernel in itertools.product(dtypes, shapes, TABLES):
        run = problem(shape, dtype, device)[kernel]
        usable = [setting for setting in grid if (kernel, setting, dtype) not in refused]
        base = run()
        off = {s: float((with_setting(kernel, s, run) - base).abs().max()) for s in usable}
        runs = {str(s): lambda s=s, run=run, kernel=kernel: with_setting(kernel, s, run)
                for s in usable}
        before = clocks() if device == "cuda" else None
        times = interleaved(runs, rounds, device)
        part = [{"kernel": kernel, "shape": shape, "dtype": str(dtype), "setting": setting,
                 "seconds": sorted(times[str(setting)])[rounds // 2], "rounds": rounds,
                 "largest_difference": off[setting], "clocks": before,
                 "chosen": setting == TABLES[kernel][KIND]} for setting in usable]
        part.sort(key=lambda row: row["seconds"])
        rows += part
        save(rows)
        print(f"{kernel}, {shape}, {dtype}, {time.perf_counter() - begin:.0f} s", flush=True)
        for row in part[:6] + [row for row in part[6:] if row["chosen"]]:
            print(f"  {row['setting']!s:<20} {row['seconds'] * 1e6:9.1f} us  difference "
                  f"{row['largest_difference']:.1e}{'  now' if row['chosen'] else ''}", flush=True)
