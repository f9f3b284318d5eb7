"""Whole denoising loops of full-size architectures with random weights: stock against staged.

python benchmarks/staged_gpu.py                  # one GPU, about three minutes
python benchmarks/staged_gpu.py --tiny           # the same code on a CPU, in seconds

Random weights: the time of a step does not depend on them. The loop is the stock pipeline's call
with text embeddings given, up to the latents, and every step is timed; one untimed loop first.
Where `cap` is set, at most so many steps of a stage are run and the loop's time is their mean times
the stage's steps; rows say how many were run. Quality is measured on trained models
(benchmarks/staged.py).
"""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.method import Method  # noqa: E402
from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage  # noqa: E402
from fastdiff.policies.tile_sparse import TileSparse  # noqa: E402

STEPS = 50
SPARSE = TileSparse(density=0.15, dense_steps=0)
PRESETS = {name: BottleneckSampling(name) for name in ("balanced", "fast", "video")}


@dataclass(frozen=True)
class Case:
    """A pipeline at a size, and the method sets to time beside stock.

    repeats: timed loops of each, after one that is not. cap: see above.
    """

    build: Callable[[bool, str], tuple[Any, dict[str, Any]]]
    size: dict[str, int]
    tiny: dict[str, int]
    runs: dict[str, tuple[Method, ...]]
    repeats: int = 2
    cap: int | None = None
    stock_cap: int | None = None


def flux(tiny: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev: 19 double and 38 single blocks, 512 text tokens."""
    config: dict[str, Any] = {"guidance_embeds": True}
    text, width, pooled = 512, 4096, 768
    if tiny:
        text, width, pooled = 8, 32, 32
        config |= {"in_channels": 16, "num_layers": 1, "num_single_layers": 1,
                   "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8),
                   "joint_attention_dim": width, "pooled_projection_dim": pooled}
    model = _made(lambda: diffusers.FluxTransformer2DModel(**config), device)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, model)
    return pipe, {"prompt_embeds": _random(model, 1, text, width),
                  "pooled_prompt_embeds": _random(model, 1, pooled)}


def hunyuan(tiny: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo: 20 double and 40 single blocks, 256 text tokens."""
    config: dict[str, Any] = {}
    text, width, pooled = 256, 4096, 768
    if tiny:
        text, width, pooled = 8, 16, 32
        config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
                  "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
                  "num_refiner_layers": 1, "text_embed_dim": width,
                  "pooled_projection_dim": pooled, "rope_axes_dim": (4, 6, 6)}
    model = _made(lambda: diffusers.HunyuanVideoTransformer3DModel(**config), device)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(None, None, model, None, scheduler, None, None)
    return pipe, {"prompt_embeds": _random(model, 1, text, width),
                  "pooled_prompt_embeds": _random(model, 1, pooled),
                  "prompt_attention_mask": torch.ones(1, text, device=device)}


CASES = {
    "flux-1024": Case(
        flux, {"height": 1024, "width": 1024}, {"height": 64, "width": 64},
        {name: (PRESETS[name],) for name in ("balanced", "fast")}),
    "flux-2048": Case(
        flux, {"height": 2048, "width": 2048}, {"height": 96, "width": 96},
        {**{name: (PRESETS[name],) for name in ("balanced", "fast")},
         "fast and tile-sparse": (SPARSE, PRESETS["fast"])}, repeats=1, cap=4, stock_cap=6),
    "hunyuan-720p": Case(
        hunyuan, {"height": 720, "width": 1280, "num_frames": 129},
        {"height": 64, "width": 96, "num_frames": 9},
        {"video": (PRESETS["video"],), "video and tile-sparse": (SPARSE, PRESETS["video"])},
        repeats=1, cap=1, stock_cap=1),
}


def _made(make: Callable[[], torch.nn.Module], device: str) -> torch.nn.Module:
    with torch.device(device):
        model = make()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return model.to(dtype).eval().requires_grad_(False)


def _random(model: Any, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def capped(method: Method, cap: int | None, force: bool) -> Method:
    """The same method, with at most `cap` steps in each stage."""
    if not isinstance(method, BottleneckSampling):
        return replace(method, min_tokens=1) if force else method
    if cap is None and not force:
        return method
    chosen = method.chosen
    stages = [Stage(s.scale, min(s.count(STEPS), cap or STEPS), s.sigma_start, s.shift)
              for s in chosen.stages]
    return BottleneckSampling(stages=stages, transition=chosen.transition, force=force)


def stage_steps(methods: tuple[Method, ...]) -> list[int]:
    """Steps of every stage in a call of STEPS; stock is one stage."""
    for method in methods:
        if isinstance(method, BottleneckSampling):
            return [stage.count(STEPS) for stage in method.chosen.stages]
    return [STEPS]


def timed_call(pipe: Any, call: dict[str, Any], steps: int, device: str) -> list[float]:
    """Seconds of every step of one call."""
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    def after(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        stamp()
        return tensors

    hook = pipe.transformer.register_forward_pre_hook(
        lambda *_: stamp() if not stamps else None)
    out = pipe(num_inference_steps=steps, output_type="latent", return_dict=False,
               generator=torch.Generator("cpu").manual_seed(0), callback_on_step_end=after,
               **call)[0]
    hook.remove()
    assert out.isfinite().all(), "random weights gave NaN"
    return [b - a for a, b in zip(stamps, stamps[1:], strict=False)]


def measure(name: str, case: Case, tiny: bool, device: str) -> list[dict[str, Any]]:
    pipe, call = case.build(tiny, device)
    pipe.set_progress_bar_config(disable=True)
    call |= case.tiny if tiny else case.size
    runs = {"stock": (), **case.runs}
    loops: dict[str, list[float]] = {run: [] for run in runs}
    told: dict[str, dict[str, Any]] = {}
    warm = 1 if device == "cuda" else 0
    for repeat in range(-warm, case.repeats):
        for run, methods in runs.items():
            fastdiff.disable(pipe)
            whole = stage_steps(methods)
            cap = case.cap if methods else case.stock_cap
            steps = min(STEPS, case.stock_cap or STEPS) if not methods else STEPS
            if repeat < 0 and case.cap == 1 and SPARSE not in methods:
                continue  # a step of this size takes so long that only a kernel's build shows
            if methods:
                fastdiff.enable(pipe, *(capped(m, cap, tiny) for m in methods), strict=True)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = timed_call(pipe, call, steps, device)
            if repeat < 0:
                continue
            done = [min(n, cap or n) for n in whole]
            assert len(seconds) == sum(done), (len(seconds), done)
            each, at = [], 0
            for n in done:
                each.append(statistics.fmean(seconds[at : at + n]))
                at += n
            loops[run].append(sum(n * s for n, s in zip(whole, each, strict=True)))
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            told[run] = {
                "steps": whole, "steps_run": done, "seconds_a_step": [round(s, 5) for s in each],
                "peak_memory_gib": round(peak, 2), "methods": [m.to_dict() for m in methods],
                "report": dict(pipe.fastdiff.report.methods) if methods else {},
            }
    fastdiff.disable(pipe)
    base = statistics.median(loops["stock"])
    rows = []
    for run in runs:
        spread = record.spread(loops[run])
        rows.append({"case": name, "run": run, "call": case.tiny if tiny else case.size,
                     "dtype": str(pipe.transformer.dtype), **spread,
                     "speedup": base / spread["seconds"], **told[run]})
        print(f"{name:<14} {run:<24} {spread['seconds']:9.3f} s  "
              f"{base / spread['seconds']:5.2f}x  {told[run]['seconds_a_step']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="small models and sizes, on any device")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "_tiny" if args.tiny else ""
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        rows += measure(name, CASES[name], args.tiny, device)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        settings = {"cases": args.cases, "steps": STEPS, "tiny": args.tiny}
        record.write(args.output / f"staged_loop_{device}{suffix}.json", "staged_loop", device,
                     settings, rows)


if __name__ == "__main__":
    main()
