"""One denoiser forward of full-size architectures with random weights, stock against FastDiff.

Random weights: the time of a selection at a fixed density does not depend on them; quality is
measured elsewhere, on trained models.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from denoisers import ARCHITECTURES, materialise  # noqa: E402

import fastdiff  # noqa: E402

VARIANTS: list[tuple[str, dict[str, Any] | None]] = [
    ("stock", None),
    ("tile-sparse 0.25", {"density": 0.25}),
    ("tile-sparse 0.15", {"density": 0.15}),
    ("tile-sparse 0.15, reuse 5", {"density": 0.15, "reuse": 5}),
    ("tile-sparse 0.1", {"density": 0.1}),
    ("tile-sparse 0.1, no tail", {"density": 0.1, "tail": False}),
]


MODELS = ("wan-1.3b-480p", "wan-14b-720p")


@torch.no_grad()
def measure(name: str, layers: int | None, repeats: int, small: bool, device: str) -> list[dict]:
    all_layers = ARCHITECTURES[name].layers[1]
    layers = layers or all_layers
    model, inputs = materialise(ARCHITECTURES[name], layers, device, small)
    dtype = inputs["hidden_states"].dtype
    seconds: dict[str, list[float]] = {}
    info: dict[str, dict[str, Any]] = {}
    stock = None
    for repeat in range(-1, repeats):
        for variant, knobs in VARIANTS:
            fastdiff.disable(model)
            handle = None
            if knobs is not None:
                least = {"min_tokens": 1} if small else {}
                handle = fastdiff.enable(model, "tile-sparse", strict=True, **least, **knobs)
                handle.clock.begin(50)
                handle.clock.step = 25
                if knobs.get("reuse"):
                    model(**inputs, return_dict=False)
                    handle.clock.step = 26
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            out = model(**inputs, return_dict=False)[0]
            if device == "cuda":
                torch.cuda.synchronize()
            last = time.perf_counter() - start
            stock = out if stock is None else stock
            if repeat < 0:
                peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
                info[variant] = {
                    "density": handle.report.summary()["density"] if handle else 1.0,
                    "op_seconds": handle.report.summary()["seconds"] if handle else None,
                    "peak_memory_gib": round(peak, 3),
                    "relative_error": float((out - stock).float().norm() / stock.float().norm()),
                }
                continue
            seconds.setdefault(variant, []).append(last)
            if handle:
                info[variant]["op_seconds"] = handle.report.summary()["seconds"]
    fastdiff.disable(model)
    rows = []
    base = record.spread(seconds["stock"])["seconds"]
    for variant, times in seconds.items():
        spread = record.spread(times)
        rows.append({"model": name, "layers": layers, "of_layers": all_layers, "dtype": str(dtype),
                     "shape": list(inputs["hidden_states"].shape), "variant": variant, **spread,
                     "speedup": base / spread["seconds"], **info[variant]})
        print(f"{name} {variant:<28} {spread['seconds'] * 1e3:9.1f} ms "
              f"{base / spread['seconds']:5.2f}x {info[variant]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer layers than the real model (recorded)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a smoke run on tiny latents")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.models:
        rows += measure(name, args.layers, args.repeats, args.small, device)
        suffix = "_small" if args.small else ""
        settings = {"layers": args.layers, "repeats": args.repeats}
        record.write(args.output / f"denoiser_{device}{suffix}.json", "denoiser", device,
                     settings, rows)


if __name__ == "__main__":
    main()
