"""Seconds of one forward of a pipeline's denoiser, stock and every method in turn."""

import time
from typing import Any

import knobs
import record
import torch
from clips import Maker, synchronize

import fastdiff
from fastdiff.api import find_denoisers
from fastdiff.method import Method


class _Captured(Exception):
    """The arguments are known; the rest of the generation is not needed."""


def inputs_of(maker: Maker, prompt: str) -> tuple[torch.nn.Module, tuple, dict[str, Any]]:
    """The denoiser, and the arguments of its first forward in a real generation."""
    model = next(iter(find_denoisers(maker.pipe).values()))
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def capture(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Captured

    hook = model.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        maker.pipe(prompt, generator=torch.Generator("cpu").manual_seed(0), output_type="latent",
                   **maker.call)
    except _Captured:
        pass
    finally:
        hook.remove()
    return model, *seen[0]


@torch.no_grad()
def measure(
    maker: Maker, methods: dict[str, Method | None], prompt: str, repeats: int, bar: Any
) -> list[dict[str, Any]]:
    """Median, p20 and p80 of a forward in the middle of a run, where methods are sparse.

    All variants run in turn, round after round; the first two rounds are not counted.
    """
    model, args, kwargs = inputs_of(maker, prompt)
    steps = maker.call["num_inference_steps"]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    facts: dict[str, dict[str, Any]] = {}
    stock = None
    for repeat in range(-2, repeats):
        bar("timing", repeat + 2, repeats + 2)
        for name, method in methods.items():
            fastdiff.disable(maker.pipe)
            handle = None
            if method is not None:
                handle = fastdiff.enable(maker.pipe, method, strict=True)
                handle.clock.begin(steps)
                handle.clock.step = steps // 2
            synchronize(maker.device)
            if maker.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            out = model(*args, **kwargs)
            synchronize(maker.device)
            last = time.perf_counter() - begin
            out = out[0] if isinstance(out, tuple) else out.sample
            if repeat >= 0:
                seconds[name].append(last)
                continue
            stock = out if stock is None else stock
            peak = torch.cuda.max_memory_allocated() / 2**30 if maker.device == "cuda" else None
            wide = stock.float()
            facts[name] = {
                "density": knobs.realised(handle.report.summary()) if handle else 1.0,
                "peak_memory_gib": None if peak is None else round(peak, 3),
                "relative_error": float((out.float() - wide).norm() / wide.norm()),
            }
    fastdiff.disable(maker.pipe)
    spreads = {name: record.spread(times) for name, times in seconds.items()}
    base = spreads["stock"]["seconds"]
    return [{"variant": name, **spread, "speedup": base / spread["seconds"], **facts[name]}
            for name, spread in spreads.items()]
