"""Random cases of block-sparse attention against float64, many thousands of them on a GPU.

Cases are drawn in groups that share one compiled kernel; groups run in processes side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import record  # noqa: E402
from attention_cases import HEAD_DIMS, Case, check  # noqa: E402

from fastdiff.kernels.block_sparse_attention import implementations  # noqa: E402

HALF = (torch.float16, torch.bfloat16)
GLUON_DIMS = (40, 64, 72, 80, 96, 128)


def groups(impl: str, count: int, per_group: int) -> list[list[Case]]:
    """`count` cases; those of a group differ in sizes, lists and values only."""
    draw = random.Random(0)
    found = []
    while count > 0:
        if impl == "gluon":
            dim, dtype = draw.choice(GLUON_DIMS), draw.choice(HALF)
            masked = draw.random() < 0.3
            block_q, block_k = draw.choice(((128, 128), (128, 64), (128, 32), (128, 16), (97, 117)))
        else:
            dim, masked = draw.choice(HEAD_DIMS), draw.random() < 0.3
            dtype = draw.choice((*HALF, torch.float32))
            block_q, block_k = draw.choice(((128, 128), (64, 64), (48, 96), (64, 16), (16, 16)))
        ragged, tail = draw.random() < 0.5, draw.random() < 0.5
        group = []
        for _ in range(min(per_group, count)):
            kv_heads = draw.choice((1, 2))
            group.append(Case(
                draw.choice((1, 2)), kv_heads * draw.choice((1, 2)), kv_heads,
                draw.randint(1, 3 * block_q + 17), draw.randint(1, 5 * block_k + 29), dim, block_q,
                block_k, dtype, ragged, masked, tail, all_kept=draw.random() < 0.1,
                strided=draw.random() < 0.3, seed=draw.randrange(1 << 30),
                ordered=draw.random() < 0.3))
        count -= len(group)
        found.append(group)
    return found


def run_group(group: list[Case], device: str, impl: str) -> list[tuple[str, float, str]]:
    """(case, error over what is allowed, what went wrong) of every case."""
    torch.set_num_threads(1)
    rows = []
    for case in group:
        try:
            error, allowed = check(case.build(device), impl)
            rows.append((repr(case), record.share(error, allowed), ""))
        except Exception as failure:  # every kind of failure is a result here
            rows.append((repr(case), float("nan"), f"{type(failure).__name__}: {failure}"[:200]))
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impl", nargs="*", help="default: all that can run here")
    parser.add_argument("--count", type=int, nargs="+", default=[10_000],
                        help="cases of each implementation; the last number goes on")
    parser.add_argument("--per-group", type=int, default=60)
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--output", "-o", type=Path, default=record.RESULTS)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = implementations(device, torch.float16, 64)
    impls = args.impl or [name for name in ("gluon", "triton", "torch") if not half[name]]
    rows = []
    context = multiprocessing.get_context("spawn")
    for i, impl in enumerate(impls):
        begin, count = time.perf_counter(), args.count[min(i, len(args.count) - 1)]
        found, failed = [], []
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            tasks = [pool.submit(run_group, group, device, impl)
                     for group in groups(impl, count, args.per_group)]
            for task in as_completed(tasks):
                for case, ratio, wrong in task.result():
                    (failed if wrong else found).append((case, ratio, wrong))
        worst = max(found, key=lambda row: row[1], default=("", float("nan"), ""))
        rows.append({
            "impl": impl, "cases": len(found) + len(failed), "failed": len(failed),
            "worst_error_over_allowed": worst[1], "worst_case": worst[0],
            "reasons": dict(Counter(wrong for _, _, wrong in failed)),
            "failed_cases": [case for case, _, _ in failed[:20]],
            "seconds": round(time.perf_counter() - begin, 1)})
        print(impl, {k: v for k, v in rows[-1].items() if k != "failed_cases"}, flush=True)
        record.write(args.output / f"kernel_cases_{device}.json", "kernel_cases", device,
                     {"count": args.count}, rows)
    if any(row["failed"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
