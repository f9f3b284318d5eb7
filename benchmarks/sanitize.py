"""Every kernel under compute-sanitizer: memory errors, and races in shared memory.

A process for each kernel calls it on one or two odd shapes. It runs once by itself, which compiles,
and then under each tool; the tool's summary line is the result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import record  # noqa: E402
from attention_cases import Case, equal_offsets, ragged_offsets  # noqa: E402
from window_cases import Case as WindowCase  # noqa: E402

from fastdiff.kernels.block_pool import block_pool  # noqa: E402
from fastdiff.kernels.block_sparse_attention import block_sparse_attention  # noqa: E402
from fastdiff.kernels.column_mass import column_mass  # noqa: E402
from fastdiff.kernels.linear_attention import linear_attention  # noqa: E402
from fastdiff.kernels.row_order import late_first  # noqa: E402
from fastdiff.kernels.tile_gather import tile_gather  # noqa: E402
from fastdiff.kernels.tile_select import tile_select  # noqa: E402
from fastdiff.kernels.token_permute import permute_tokens, unpermute_tokens  # noqa: E402
from fastdiff.kernels.token_select import stand_ins, top_tokens  # noqa: E402
from fastdiff.kernels.window_attention import window_attention  # noqa: E402

TOOLS = ("memcheck", "racecheck")
# how the tools begin their own lines, and what is kept of a failure
MARK = "========="
MARKED, LAST, WIDTH = 12, 5, 200
HALF = torch.float16


def attention(impl: str, device: str, gradients: bool = False) -> None:
    block = 128 if impl == "gluon" else 32
    for masked in (False, True):
        case = Case(1, 2, 1, 2 * block + 5, 3 * block - 3, 64, block, block, HALF, ragged=masked,
                    masked=masked, tail=True, seed=1)
        args = case.build(device)
        for name in ("query", "key", "value"):
            args[name].requires_grad_(gradients)
        out = block_sparse_attention(**args, impl=impl)
        assert isinstance(out, torch.Tensor)
        if gradients:
            out.sum().backward()


def windows(impl: str, device: str) -> None:
    # the text's own queries are torch's, and its fused kernels are none of ours: cuDNN's does not
    # launch under memcheck, and flash attention's for few queries writes beyond its LSE
    for fused in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    for case in (WindowCase((3, 7, 9), (2, 4, 5), after=5, dim=64, dtype=HALF),
                 WindowCase((2, 6, 5), (1, 3, 3), (1, 2, 3), "t", before=3, dim=40, dtype=HALF,
                            masked=True)):
        window_attention(**case.build(device), impl=impl)


def tokens(device: str, count: int = 75) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, 2, 40, generator=g).to(device, HALF) for _ in range(3))


def gather(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in tokens(device))
    offsets = ragged_offsets(75, 16, torch.Generator().manual_seed(0)).to(device)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0)).to(device)
    found = tile_gather(q, k, v, order, offsets, block=16, impl="triton")
    torch.stack([x.float().sum() for x in found[:5]]).sum().backward()


def select(device: str) -> None:
    q, k, v = tokens(device)
    offsets = equal_offsets(75, 16).to(device)
    none = torch.zeros(5, dtype=torch.bool, device=device)
    mean = block_pool(k, offsets, block=16, impl="triton")[0]
    for each_row in (False, True):
        tile_select(q, mean, offsets, none, none, density=0.5, each_row=each_row, impl="triton")


def permute(device: str) -> None:
    x = tokens(device)[0]
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0)).to(device)
    y = unpermute_tokens(permute_tokens(x, order, impl="triton"), order, impl="triton")
    assert torch.equal(x, y)


def pooled(device: str) -> None:
    x = tokens(device)[0]
    for offsets in (equal_offsets(75, 16), ragged_offsets(75, 16, torch.Generator())):
        block_pool(x, offsets.to(device), block=16, impl="triton")


def mass(device: str) -> None:
    q, k, _ = tokens(device)
    column_mass(q, k, impl="triton")


def linear(device: str) -> None:
    linear_attention(*tokens(device), impl="triton")


def best(device: str) -> None:
    q, k, v = (x.flatten(2) for x in tokens(device))
    kept, dropped = top_tokens(v[..., 0], 30, impl="triton")
    stand_ins(q, k, kept, dropped, impl="triton")


def ordered(device: str) -> None:
    counts = torch.randn(700, generator=torch.Generator().manual_seed(0)).exp().mul(30).int()
    late_first(counts.to(device), 9, impl="triton")


KERNELS: dict[str, Callable[[str], None]] = {
    "block_sparse_attention, gluon": lambda device: attention("gluon", device),
    "block_sparse_attention, triton": lambda device: attention("triton", device),
    "block_sparse_attention, backward": lambda device: attention("triton", device, True),
    "window_attention, gluon": lambda device: windows("gluon", device),
    "window_attention, triton": lambda device: windows("triton", device),
    "tile_gather": gather,
    "tile_select": select,
    "token_permute": permute,
    "token_select": best,
    "block_pool": pooled,
    "row_order": ordered,
    "column_mass": mass,
    "linear_attention": linear,
}


def sanitizer() -> str | None:
    """The program, from the path or from a CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = (Path(home, "bin"), Path(home, "compute-sanitizer"))
    found = (shutil.which("compute-sanitizer", path=str(place)) for place in places)
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def child(name: str, tool: list[str], seconds: float) -> dict[str, Any]:
    """One kernel in a process, under a tool or (an empty list) by itself."""
    # every allocation its own: an access beyond one then shows
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    command = [*tool, sys.executable, __file__, "--child", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"kernel": name, "failed": f"no end in {seconds:g} s"}
    text = done.stdout + done.stderr
    row: dict[str, Any] = {"kernel": name, "exit": done.returncode,
                           "took": round(time.perf_counter() - begin, 1)}
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    if summary:
        row["summary"] = summary[-1]
    if done.returncode:
        row["failed"] = cause(text)
    return row


def cause(text: str) -> str:
    """What says why a process failed: the tool's first lines, the first error, the last lines."""
    lines = [line.rstrip()[:WIDTH] for line in text.splitlines() if line.strip("= ")]
    marked = [i for i, line in enumerate(lines) if line.startswith(MARK)][:MARKED]
    errors = [i for i, line in enumerate(lines)
              if not line.startswith(MARK) and ("Error" in line or "error" in line)][:1]
    last = range(max(0, len(lines) - LAST), len(lines))
    return "\n".join(lines[i] for i in sorted({*marked, *errors, *last}))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=KERNELS, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--tool", nargs="*", choices=TOOLS, default=TOOLS)
    parser.add_argument("--seconds", type=float, default=120, help="for one kernel under one tool")
    parser.add_argument("--workers", type=int, default=min(6, os.cpu_count() or 1))
    parser.add_argument("--tiny", action="store_true",
                        help="without a GPU: the calls alone, interpreted, and no tool")
    parser.add_argument("--output", "-o", type=Path, default=record.RESULTS)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.child:
        KERNELS[args.child](device)
        if device == "cuda":
            torch.cuda.synchronize()
        return
    program = sanitizer()
    if args.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        args.tool = ()
    elif device == "cpu" or program is None:
        parser.error("no CUDA device, or no compute-sanitizer; --tiny runs the calls alone")
    names = [name for name in KERNELS if args.only in name
             and not (device == "cpu" and "gluon" in name)]
    path = args.output / f"sanitize_{device}.json" if not args.output.suffix else args.output
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for tool in (None, *args.tool):
            prefix = [str(program), "--tool", tool, "--error-exitcode", "9"] if tool else []
            for row in pool.map(lambda name, p=prefix: child(name, p, args.seconds), names):
                rows.append({**row, "tool": tool})
                print(f"{tool or 'alone':<10} {row['kernel']:<34} "
                      f"{row.get('summary') or row.get('failed') or 'ran'}", flush=True)
                record.write(path, "sanitize", device, {"tools": list(args.tool)}, rows)
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
