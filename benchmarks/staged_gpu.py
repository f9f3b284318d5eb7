"""Denoising loops of full-size architectures with random weights: stock against staged.

python benchmarks/staged_gpu.py                  # one GPU, under two minutes
python benchmarks/staged_gpu.py --cases flux-2048 --runs fast "fast and tile-sparse"
python benchmarks/staged_gpu.py --whole --cases flux-1024      # loops as they are, step by step
python benchmarks/staged_gpu.py --tiny           # the same code on a CPU, in seconds

Random weights: the time of a step does not depend on them. A step is timed inside the stock
pipeline's call, with text embeddings given, at each size that a stage has; a loop is the sum of its
steps, and its rows say so. What happens between stages (a resize, a draw of noise) is not in the
sum; `--whole` runs staged calls from end to end, which says how much that is. Quality is measured
on trained models (benchmarks/staged.py).
"""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.method import Method  # noqa: E402
from fastdiff.pipelines.bottleneck import BottleneckSampling  # noqa: E402
from fastdiff.policies.tile_sparse import TileSparse  # noqa: E402

STEPS = 50
SPARSE = TileSparse(density=0.15, dense_steps=0)
PRESETS = {name: BottleneckSampling(name) for name in ("balanced", "fast", "video")}
SUM, WHOLE = "sum of measured steps", "whole loops"
# a step that will take longer is not repeated only to warm up
LONG_STEP = 5.0


@dataclass(frozen=True)
class Case:
    """A pipeline at a size, and the method sets to time beside stock. multiple: of a side."""

    build: Callable[[bool, str], tuple[Any, dict[str, Any]]]
    size: dict[str, int]
    tiny: dict[str, int]
    runs: dict[str, tuple[Method, ...]]
    multiple: int = 16

    def at(self, scale: float, tiny: bool) -> dict[str, int]:
        """Arguments of a call at this scale, rounded as stages are."""
        found = dict(self.tiny if tiny else self.size)
        if scale != 1:
            step = self.multiple // 4 if tiny and self.build is flux else self.multiple
            for side in ("height", "width"):
                found[side] = round(scale * found[side] / step) * step
        return found


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
         "fast and tile-sparse": (SPARSE, PRESETS["fast"])}),
    "hunyuan-720p": Case(
        hunyuan, {"height": 720, "width": 1280, "num_frames": 129},
        {"height": 64, "width": 96, "num_frames": 9},
        {"video": (PRESETS["video"],), "video and tile-sparse": (SPARSE, PRESETS["video"])}),
}


def _made(make: Callable[[], torch.nn.Module], device: str) -> torch.nn.Module:
    with torch.device(device):
        model = make()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return model.to(dtype).eval().requires_grad_(False)


def _random(model: Any, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def stages(methods: tuple[Method, ...]) -> list[tuple[float, int]]:
    """(scale, steps) of every stage in a call of STEPS; stock is one stage."""
    for method in methods:
        if isinstance(method, BottleneckSampling):
            return [(stage.scale, stage.count(STEPS)) for stage in method.chosen.stages]
    return [(1.0, STEPS)]


def attention(methods: tuple[Method, ...], tiny: bool) -> tuple[Method, ...]:
    """What runs in every step besides the stages."""
    found = [method for method in methods if not isinstance(method, BottleneckSampling)]
    return tuple(replace(method, min_tokens=1) if tiny else method for method in found)


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


@dataclass
class Machine:
    """One pipeline on one device, and the steps that were timed on it."""

    pipe: Any
    call: dict[str, Any]
    device: str
    tiny: bool
    repeats: int
    _known: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def step(self, case: Case, scale: float, methods: tuple[Method, ...]) -> dict[str, Any]:
        """Seconds of single steps at this scale, and whether steps before them warmed up."""
        size = case.at(scale, self.tiny)
        guess = self._guess(size)
        key = (tuple(size.values()), methods)
        if key not in self._known:
            fastdiff.disable(self.pipe)
            if methods:
                fastdiff.enable(self.pipe, *methods, strict=True)
            # the kernels of a method are built on first use; stock's are there after any size
            warm = int(bool(methods) or guess < LONG_STEP)
            timed = self.repeats if guess < LONG_STEP else 1
            seconds = timed_call(self.pipe, self.call | size, warm + timed, self.device)[warm:]
            self._known[key] = {"seconds": seconds, "warm": warm}
        return self._known[key]

    def _guess(self, size: dict[str, int]) -> float:
        """Seconds of a step at most, from the largest stock step that is known: square in area."""
        area = size["height"] * size["width"]
        known = [(shape[0] * shape[1], min(found["seconds"]))
                 for (shape, methods), found in self._known.items() if not methods]
        return max((s * (area / a) ** 2 for a, s in known), default=0.0)


def summed(machine: Machine, case: Case, runs: dict[str, tuple]) -> list[dict[str, Any]]:
    """A row a run: its loop as the sum of steps that were timed at every stage's size."""
    # small sizes first: they warm up, and tell how long large ones take
    wanted = {(scale, attention(methods, machine.tiny))
              for methods in runs.values() for scale, _ in stages(methods)}
    for scale, entered in sorted(wanted, key=lambda kind: (len(kind[1]), kind[0])):
        machine.step(case, scale, entered)
    rows = []
    for run, methods in runs.items():
        parts = [(steps, machine.step(case, scale, attention(methods, machine.tiny)))
                 for scale, steps in stages(methods)]
        each = [statistics.median(found["seconds"]) for _, found in parts]
        loop = sum(steps * seconds for (steps, _), seconds in zip(parts, each, strict=True))
        spans = [record.spread(found["seconds"]) for _, found in parts]
        ends = {q: sum(steps * span[q] for (steps, _), span in zip(parts, spans, strict=True))
                for q in ("p20", "p80")}
        rows.append({
            "run": run, "how": SUM, "seconds": loop, **ends, "steps": [n for n, _ in parts],
            "steps_run": [len(found["seconds"]) for _, found in parts],
            "warm_steps": [found["warm"] for _, found in parts],
            "sizes": [[*case.at(scale, machine.tiny).values()] for scale, _ in stages(methods)],
            "seconds_a_step": [round(s, 5) for s in each],
            "methods": [method.to_dict() for method in methods],
        })
    return rows


def whole(machine: Machine, case: Case, runs: dict[str, tuple]) -> list[dict[str, Any]]:
    """A row a run: staged calls from end to end, the median of their loops."""
    rows = []
    for run, methods in runs.items():
        fastdiff.disable(machine.pipe)
        entered = [*attention(methods, machine.tiny),
                   *(replace(method, force=machine.tiny) for method in methods
                     if isinstance(method, BottleneckSampling))]
        if entered:
            fastdiff.enable(machine.pipe, *entered, strict=True)
        call = machine.call | case.at(1.0, machine.tiny)
        loops = [timed_call(machine.pipe, call, STEPS, machine.device)
                 for _ in range(machine.repeats + 1)][1:]
        counts, at, each = [n for _, n in stages(methods)], 0, []
        for n in counts:
            each.append(statistics.fmean(s for loop in loops for s in loop[at : at + n]))
            at += n
        rows.append({
            "run": run, "how": WHOLE, **record.spread([sum(loop) for loop in loops]),
            "steps": counts, "steps_run": counts, "seconds_a_step": [round(s, 5) for s in each],
            "methods": [method.to_dict() for method in methods],
            "report": dict(machine.pipe.fastdiff.report.methods) if entered else {},
        })
    return rows


def main() -> None:
    args = _arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how, way = (WHOLE, whole) if args.whole else (SUM, summed)
    suffix = ("_whole" if args.whole else "") + ("_tiny" if args.tiny else "")
    rows: list[dict[str, Any]] = []
    machines: dict[Any, Machine] = {}
    for name in args.cases:
        case = CASES[name]
        if case.build not in machines:
            machines.clear()  # one large model at a time
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            pipe, call = case.build(args.tiny, device)
            pipe.set_progress_bar_config(disable=True)
            machines[case.build] = Machine(pipe, call, device, args.tiny, args.repeats)
        machine = machines[case.build]
        runs = {"stock": (), **{run: methods for run, methods in case.runs.items()
                                if not args.runs or run in args.runs}}
        found = way(machine, case, runs)
        base = found[0]["seconds"]
        for row in found:
            row |= {"case": name, "call": case.at(1.0, args.tiny), "speedup": base / row["seconds"],
                    "dtype": str(machine.pipe.transformer.dtype)}
            print(f"{name:<14} {row['run']:<24} {row['seconds']:9.3f} s  {row['speedup']:5.2f}x  "
                  f"{row['seconds_a_step']}", flush=True)
        fastdiff.disable(machine.pipe)
        rows += found
        settings = {"cases": args.cases, "steps": STEPS, "tiny": args.tiny, "how": how}
        record.write(args.output / f"staged_loop_{device}{suffix}.json", "staged_loop", device,
                     settings, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    known = {run for case in CASES.values() for run in case.runs}
    parser.add_argument("--runs", nargs="*", default=[], choices=sorted(known),
                        help="beside stock; all of a case without it")
    parser.add_argument("--repeats", type=int, default=4, help="timed steps (or loops) of each")
    parser.add_argument("--whole", action="store_true", help="staged calls from end to end")
    parser.add_argument("--tiny", action="store_true", help="small models and sizes, on any device")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
