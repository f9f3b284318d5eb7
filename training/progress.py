"""Wall clock, log lines, guarded compilation and the timed loop that every stage runs in."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Log:
    """Flushed lines on the terminal and the same values as JSON lines in a file."""

    def __init__(self, path: Path, seconds: float):
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.path = path

    def now(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.end - time.monotonic()

    def write(self, stage: str, **values: Any) -> None:
        row = {"time": round(self.now(), 2), "stage": stage, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        words = " ".join(
            f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
        )
        print(f"[{self.now():6.1f}s] {stage}: {words}", flush=True)


class Compiler:
    """`torch.compile` with fixed shapes, which can be switched off for good after a failure."""

    def __init__(self, active: bool):
        self.active = active
        for name in ("cache_size_limit", "recompile_limit", "accumulated_recompile_limit"):
            if active and hasattr(torch._dynamo.config, name):
                setattr(torch._dynamo.config, name, 256)

    def __call__(self, function: Callable) -> Callable:
        if not self.active:
            return function
        compiled = torch.compile(function, dynamic=False)

        def run(*args: Any) -> Any:
            return compiled(*args) if self.active else function(*args)

        return run

    def guard(self, step: Callable, log: Log, stage: str) -> Callable:
        """`step`, repeated without compilation if it fails while that is on."""

        def run(*args: Any) -> Any:
            try:
                return step(*args)
            except Exception as error:
                if not self.active:
                    raise
                self.active = False
                log.write(stage, compile_failed=repr(error)[:500])
                return step(*args)

        return run


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_loop(
    stage: str,
    step: Callable[[float], dict[str, Tensor]],
    seconds: float,
    log: Log,
    device: torch.device,
    reserve: float = 0.0,
) -> tuple[float, int]:
    """Call `step(progress)` for `seconds` or until `reserve` seconds are left of the piece.

    The device is synchronised about twice a second only. Returns seconds and steps spent.
    """
    begin = shown = time.monotonic()
    steps, check, spent, shown_steps = 0, 1, 0.0, 0
    latest: dict[str, Tensor] = {}
    while True:
        latest.update(step(min(spent / max(seconds, 1e-6), 1.0)))
        steps += 1
        if steps < check:
            continue
        synchronise(device)
        now = time.monotonic()
        spent = now - begin
        done = spent >= seconds or log.left() <= reserve
        if now - shown >= 10 or done:
            rate = (steps - shown_steps) / max(now - shown, 1e-6)
            values = {k: float(v) for k, v in latest.items()}
            log.write(stage, steps=steps, spent=round(spent, 1), rate=round(rate, 2), **values)
            shown, shown_steps = now, steps
        if done:
            return spent, steps
        recent = (now - shown) / max(steps - shown_steps, 1) if steps > shown_steps else 0.05
        check = steps + max(1, min(200, int(0.4 / max(recent, 1e-4))))


def fast_arithmetic(device: torch.device) -> None:
    """TF32 products and tuned convolutions on a GPU.

    cuDNN's attention stays off: torch 2.11 prefers it on an H200, and the first compiled backward
    over 288 tokens ended in an illegal memory access there.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 4
