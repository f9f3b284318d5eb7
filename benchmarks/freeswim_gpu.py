"""FreeSwim on full-size Wan architectures with random weights: seconds a step, and memory.

python benchmarks/freeswim_gpu.py                       # one GPU, about 150 s
python benchmarks/freeswim_gpu.py --parts 1.3b 24gb     # 1.3B at 1088x1920, 81 frames
python benchmarks/freeswim_gpu.py --parts 14b           # one block of 14B at 2160x3840
python benchmarks/freeswim_gpu.py --tiny                # the same code on a CPU, in seconds

Random weights: the time of a pass does not depend on them. A pass is one forward of the denoiser
for one guidance branch. Four kinds are timed: dense, guide (both branches), window, reuse. A step
is two passes, so the four give every mode: dense 2 dense; nocache 2 guide; cache c: a guide pass in
every c-th of the 35 kept steps and reuse in the others, and a window pass in all. Dense attention
runs on the fastest kernel of the machine, here and in the guide. What is extrapolated says so.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from denoisers import Architecture, materialise, wan, wan_inputs  # noqa: E402
from dense_kernels import dense_kernel, kernels  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.clock import StepClock  # noqa: E402
from fastdiff.method import Part  # noqa: E402
from fastdiff.pipelines.families import family_of  # noqa: E402
from fastdiff.pipelines.freeswim import SCALE_MULT  # noqa: E402
from fastdiff.pipelines.upscale.cache import GuideCache  # noqa: E402
from fastdiff.pipelines.upscale.dual import DualPath, Sizes, Ways  # noqa: E402
from fastdiff.policies.tile_sparse import TileSparse  # noqa: E402

KEPT = 35
CARD = 24e9


@dataclass(frozen=True)
class Case:
    """native, target: sides in pixels. layers: (that are run, of the real model)."""

    title: str
    heads: int
    ffn: int
    native: tuple[int, int]
    target: tuple[int, int]
    layers: tuple[int, int]
    frames: int = 21

    def made(self, layers: int, tiny: bool, device: str) -> tuple[Any, dict[str, Any]]:
        grid = (self.frames, self.target[0] // 8, self.target[1] // 8)
        architecture = Architecture(self.title, wan(self.heads, self.ffn), wan_inputs(grid),
                                    self.layers)
        return materialise(architecture, layers, device, tiny)


CASES = {
    "1.3b": Case("Wan2.1 1.3B, 81 frames of 1088 x 1920", 12, 8960, (480, 832), (1088, 1920),
                 (30, 30)),
    "14b": Case("Wan2.1 14B, 81 frames of 2160 x 3840", 40, 13824, (720, 1280), (2160, 3840),
                (1, 40)),
}
# the small inputs of denoisers.py: a grid of 3 x 10 x 12 tokens
TINY = {"native": (80, 96), "target": (160, 192), "layers": 2}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None


@contextmanager
def sparse_guide(model: Any, density: float | None) -> Iterator[None]:
    """The guide's attention by tiles, so that its cost falls."""
    if density is not None:
        fastdiff.enable(model, TileSparse(density=density, dense_steps=0, min_tokens=1,
                                          max_density=1.0))
    try:
        yield
    finally:
        fastdiff.disable(model)


class Passes:
    """One model on one device, and the passes of the dual path."""

    def __init__(self, case: Case, layers: int, tiny: bool, device: str) -> None:
        self.device, self.tiny = device, tiny
        self.native, self.target = ((TINY["native"], TINY["target"]) if tiny
                                    else (case.native, case.target))
        self.model, self.inputs = case.made(layers, tiny, device)
        self.places: list[str] = []
        self.plan: Any = None

    @contextmanager
    def dual(self, place: str, slide: str = "tile") -> Iterator[StepClock]:
        """The dual path in mode cache with an interval of two: step 0 guides, step 1 reuses."""
        clock = StepClock()
        clock.begin(KEPT)
        path = DualPath(Ways("cache", 2, slide, SCALE_MULT),
                        Sizes(self.native, self.target, 16), clock,
                        GuideCache(place, self.places.append), True, lambda: False,
                        lambda what: None)
        path.on_plan = lambda plan: setattr(self, "plan", plan)
        part = Part(self.model, family_of(self.model))
        with path.entered({"transformer": part}):
            yield clock

    def run(self, clock: StepClock | None, kind: str) -> float:
        """Seconds of one pass: dense, guide, reuse or window."""
        if clock is not None:
            clock.step, clock.branch = (1 if kind == "reuse" else 0), "cond"
            if kind == "window":
                clock.branch = "uncond"
        synchronize(self.device)
        begin = time.perf_counter()
        self.model(**self.inputs, return_dict=False)
        synchronize(self.device)
        return time.perf_counter() - begin

    def measured(self, kinds: tuple[str, ...], rounds: int, place: str = "device",
                 density: float | None = None, slide: str = "tile") -> dict[str, dict[str, Any]]:
        """Times and peak memory of these passes; guide comes before reuse."""
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        peaks: dict[str, float | None] = {}
        for _ in range(rounds):
            if "dense" in kinds:
                self._note("dense", times, peaks, None)
            with sparse_guide(self.model, density), self.dual(place, slide) as clock:
                for kind in kinds:
                    if kind != "dense":
                        self._note(kind, times, peaks, clock)
        return {kind: {**record.spread(seconds), "peak_memory_gib": peaks[kind]}
                for kind, seconds in times.items()}

    def _note(self, kind: str, times: dict, peaks: dict, clock: StepClock | None) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times[kind].append(self.run(clock, kind))
        peaks[kind] = peak(self.device)
        print(f"  {kind:<8} {times[kind][-1]:9.3f} s  peak {peaks[kind]} GiB", flush=True)

    def close(self) -> None:
        del self.model, self.inputs
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def fastest_kernel(case: Case, tiny: bool, device: str) -> str:
    """The dense kernel that is fastest on a part of the queries of this size."""
    heads, tokens = case.heads, case.frames * case.target[0] * case.target[1] // 256
    if tiny:
        heads, tokens = 2, 360
    shape = (1, heads, tokens, 128)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    found: dict[str, float] = {}
    for name in kernels(device):
        with dense_kernel(name):
            for _ in range(2):
                synchronize(device)
                begin = time.perf_counter()
                F.scaled_dot_product_attention(q[:, :, : tokens // 16], k, v)
                synchronize(device)
                found[name] = time.perf_counter() - begin
    print("dense kernels, s:", {name: round(s, 4) for name, s in found.items()}, flush=True)
    return min(found, key=lambda name: found[name])


def steps(passes: dict[str, float], guide: str = "guide") -> dict[str, float]:
    """Mean seconds of a step of every mode, from those of the passes."""
    dense, dual, window, reuse = (passes[kind] for kind in ("dense", guide, "window", "reuse"))
    found = {"dense": 2 * dense, "nocache": 2 * dual}
    for interval in (2, 5):
        guides = -(-KEPT // interval)
        cond = (guides * dual + (KEPT - guides) * reuse) / KEPT
        found[f"cache {interval}"] = cond + window
    return found


def rows_of(part: str, passes: dict[str, dict[str, Any]], scale: float, note: str,
            guide: str = "guide") -> list[dict[str, Any]]:
    seconds = {kind: scale * about["seconds"] for kind, about in passes.items()}
    found = steps(seconds, guide)
    return [{"part": part, "what": "step", "run": run if guide == "guide" or run == "dense"
             else f"{run}, sparse guide", "seconds": s, "of_dense": s / found["dense"],
             "note": note} for run, s in found.items()
            if guide == "guide" or run not in ("dense", "nocache")]


def pass_rows(part: str, passes: dict[str, dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [{"part": part, "what": "pass", "run": kind, **about, **more}
            for kind, about in passes.items()]


def whole(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """All layers of the 1.3B at 1088 x 1920."""
    case = CASES["1.3b"]
    layers = args.layers or (TINY["layers"] if args.tiny else case.layers[0])
    warm = Passes(case, 1, args.tiny, device)
    with dense_kernel(fastest_kernel(case, args.tiny, device)):
        print("warm-up, one layer", flush=True)
        warm.measured(("dense", "guide", "reuse", "window"), 1)
        warm.measured(("guide",), 1, density=args.guide_density)
        warm.measured(("window",), 1, slide="token")
        warm.close()
        passes = Passes(case, layers, args.tiny, device)
        print(f"{case.title}, {layers} layers", flush=True)
        found = passes.measured(("dense", "guide", "reuse", "window"), args.rounds)
        sparse = passes.measured(("guide",), 1, density=args.guide_density)
        found["sparse guide"] = sparse["guide"]
        plan = passes.plan
        found["window, by token"] = passes.measured(("window",), 1, slide="token")["window"]
        passes.close()
    of = layers if args.tiny else case.layers[1]
    note = "" if layers == of else f"extrapolated from {layers} of {of} layers"
    about = {"layers": layers, "of_layers": of, "tokens": plan.layout.tokens,
             "window_density": plan.density, "tile": list(plan.tile),
             "guide_density": args.guide_density}
    rows = pass_rows("1.3b", found, **about)
    rows += rows_of("1.3b", found, of / layers, note)
    return rows + rows_of("1.3b", found, of / layers, note, "sparse guide")


def small_card(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The same passes inside 24 GB, with what the guide said in main memory."""
    case = CASES["1.3b"]
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    layers = args.layers or (TINY["layers"] if args.tiny else case.layers[0])
    passes = Passes(case, layers, args.tiny, device)
    try:
        print("inside 24 GB", flush=True)
        found = passes.measured(("guide", "reuse", "window"), 1, place="host")
    except torch.cuda.OutOfMemoryError as error:
        return [{"part": "24gb", "what": "failed", "run": "guide", "note": str(error)[:200]}]
    finally:
        passes.close()
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return pass_rows("24gb", found, layers=layers, memory_limit_gb=CARD / 1e9,
                     guide_kept=passes.places[-1])


def block(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One block of the 14B at 2160 x 3840; the whole model is extrapolated."""
    case = CASES["14b"]
    passes = Passes(case, 1, args.tiny, device)
    with dense_kernel(fastest_kernel(case, args.tiny, device)):
        print(f"{case.title}, 1 layer", flush=True)
        found = passes.measured(("window", "dense"), 1)
        derived = ""
        both = fitting(passes)
        if both is None:
            # both rows at once do not fit: their passes one after the other
            derived = "; guide is dense + window, as both at once did not fit"
            found |= passes.measured(("window",), 1)
            seconds = found["dense"]["seconds"] + found["window"]["seconds"]
            both = {"guide": {"seconds": seconds, "peak_memory_gib": None, "repeats": 0},
                    "reuse": dict(found["window"])}
        found |= both
    plan = passes.plan
    passes.close()
    of = case.layers[1]
    rows = pass_rows("14b", found, layers=1, of_layers=of, tokens=plan.layout.tokens,
                     window_density=plan.density, tile=list(plan.tile))
    return rows + rows_of("14b", found, of, f"extrapolated from 1 of {of} layers{derived}")


def fitting(passes: Passes) -> dict[str, dict[str, Any]] | None:
    """The passes with both rows at once; None where memory does not hold them."""
    try:
        return passes.measured(("guide", "reuse", "window"), 1)
    except torch.cuda.OutOfMemoryError:
        print("  both rows at once do not fit", flush=True)
    # outside of the handler, which holds on to the frames that failed
    gc.collect()
    torch.cuda.empty_cache()
    return None


PARTS = {"1.3b": whole, "24gb": small_card, "14b": block}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=1, help="times that each pass is timed")
    parser.add_argument("--layers", type=int, help="of the 1.3B; fewer are extrapolated")
    parser.add_argument("--guide-density", type=float, default=0.25,
                        help="of the block-sparse guide")
    parser.add_argument("--tiny", action="store_true", help="small models and sizes, on any device")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "_tiny" if args.tiny else ""
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for part in args.parts:
            begin = time.perf_counter()
            rows += PARTS[part](args, device)
            print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)
            settings = {"parts": args.parts, "rounds": args.rounds, "kept_steps": KEPT,
                        "guide_density": args.guide_density, "tiny": args.tiny}
            record.write(args.output / f"freeswim_gpu_{device}{suffix}.json", "freeswim_gpu",
                         device, settings, rows)
    for row in rows:
        if row["what"] == "step":
            print(f"{row['part']:<6} {row['run']:<24} {row['seconds']:9.2f} s a step  "
                  f"{row['of_dense']:5.2f} of dense  {row['note']}")


if __name__ == "__main__":
    main()
