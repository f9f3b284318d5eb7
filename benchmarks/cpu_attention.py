"""CPU time of block-sparse attention (torch implementation) against dense SDPA, interleaved."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.block_sparse_attention import block_sparse_attention

RESULT = Path(__file__).parent / "results" / "cpu_attention.json"


def offsets_of(tokens: int, blocks: str) -> torch.Tensor:
    """64-token blocks, or the 48- to 64-token blocks that tiles at a grid's border make."""
    lengths, total, step = [], 0, (64,) if blocks == "64" else (64, 48, 56, 64, 48)
    while total < tokens:
        lengths.append(min(step[len(lengths) % len(step)], tokens - total))
        total += lengths[-1]
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def random_lists(heads: int, blocks: int, kept: int, uneven: bool) -> tuple[torch.Tensor, ...]:
    """(indices, counts, keep): `kept` blocks per row, or between half and one and a half times."""
    indices = torch.rand(1, heads, blocks, blocks).argsort(-1)
    counts = torch.full((1, heads, blocks), kept)
    if uneven:
        counts = torch.randint(max(1, kept // 2), kept + kept // 2 + 1, counts.shape)
    keep = torch.zeros(indices.shape, dtype=torch.bool)
    keep.scatter_(-1, indices, torch.arange(blocks) < counts[..., None])
    return indices[..., : int(counts.max())].int().contiguous(), counts.int(), keep


def interleaved(candidates: dict, rounds: int) -> dict[str, list[float]]:
    seconds = {name: [] for name in candidates}
    for name in candidates:
        candidates[name]()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(found) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one small shape, three rounds")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = ((512, 2, 64),) if args.quick else ((2304, 8, 64), (4096, 8, 64), (8192, 6, 64))
    rounds = 3 if args.quick else args.rounds
    rows = []
    print("tokens  blocks density  tail  dense ms       ms  speed-up")
    for tokens, heads, dim in shapes:
        q, k, v = (torch.randn(1, tokens, heads, dim) for _ in range(3))
        for blocks in ("64", "48-64", "uneven"):
            offsets = offsets_of(tokens, blocks)
            number = len(offsets) - 1
            mean_k, weight = block_pool(k, offsets, block=64)
            mean_v, _ = block_pool(v, offsets, block=64)
            lengths = offsets.diff().double()
            for asked in (0.5, 0.25, 0.1):
                kept = max(1, round(asked * number))
                indices, counts, keep = random_lists(heads, number, kept, blocks == "uneven")
                pairs = lengths @ keep.double().mean((0, 1)) @ lengths
                density = float(pairs) / tokens**2

                tail = (mean_k, mean_v, weight, keep)
                run = functools.partial(
                    block_sparse_attention,
                    *(q, k, v, indices, counts, offsets, offsets),
                    block_q=64,
                    block_k=64,
                    impl="torch",
                )
                heads_first = [x.transpose(1, 2) for x in (q, k, v)]
                candidates = {
                    "dense": functools.partial(F.scaled_dot_product_attention, *heads_first),
                    "False": run,
                    "True": functools.partial(run, tail=tail),
                }
                times = interleaved(candidates, rounds)
                base = times["dense"]
                for with_tail in ("False", "True"):
                    found = times[with_tail]
                    mid, p20, p80 = (found[int(len(found) * x)] for x in (0.5, 0.2, 0.8))
                    rows.append(
                        {
                            "tokens": tokens,
                            "heads": heads,
                            "head_dim": dim,
                            "dtype": "float32",
                            "blocks": blocks,
                            "density": round(density, 4),
                            "tail": with_tail == "True",
                            "seconds": mid,
                            "p20": p20,
                            "p80": p80,
                            "dense_seconds": base[len(base) // 2],
                            "dense_p20": base[int(len(base) * 0.2)],
                            "dense_p80": base[int(len(base) * 0.8)],
                            "speedup": round(base[len(base) // 2] / mid, 3),
                            "rounds": rounds,
                        }
                    )
                    row = rows[-1]
                    print(
                        f"{tokens:6} {blocks:>7} {density:7.3f} {with_tail:>5} "
                        f"{row['dense_seconds'] * 1e3:9.1f} {mid * 1e3:8.1f}  {row['speedup']:.2f}",
                        flush=True,
                    )
    device = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    result = {
        "benchmark": "cpu_attention",
        "device": f"{device}, {args.threads} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, args.output)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
