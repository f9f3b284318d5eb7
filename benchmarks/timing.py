"""Times of candidates that run in turn, and the card's clocks meanwhile."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def interleaved(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of a call of every candidate. Each round, each is called for about 20 ms in a row:
    the device then never waits for the host, unless the host is what is slow."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    calls = {name: max(1, min(50, round(0.02 / timed(run, 1, device))))
             for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(timed(run, calls[name], device))
    return found


def tried(
    runs: dict[str, Run], rounds: int, device: str, about: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows of the candidates that cannot run here, with why, and `interleaved` of the others.

    about: the rest of such a row.
    """
    rows, working = [], {}
    for name, run in runs.items():
        try:
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            working[name] = run
        except Exception as error:  # what cannot run here is a row that says why
            rows.append({**about, "what": name, "failed": f"{type(error).__name__}: {error}"[:300]})
    return rows, interleaved(working, rounds, device)


def timed(run: Run, calls: int, device: str) -> float:
    """Seconds of a call; on a GPU between events, on a CPU by the clock."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def host_microseconds(run: Run, calls: int = 100) -> float:
    """Time of the host for one call, the device working behind."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / calls * 1e6


def clocks() -> str | None:
    """Clock and power of the card now, as its driver tells them."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
