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
import record  # noqa: E402

import fastdiff  # noqa: E402

VARIANTS: list[tuple[str, dict[str, Any] | None]] = [
    ("stock", None),
    ("tile-sparse 0.25", {"density": 0.25}),
    ("tile-sparse 0.15", {"density": 0.15}),
    ("tile-sparse 0.15, reuse 5", {"density": 0.15, "reuse": 5}),
    ("tile-sparse 0.1", {"density": 0.1}),
    ("tile-sparse 0.1, no tail", {"density": 0.1, "tail": False}),
]


def wan_1_3b(layers: int) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 1.3B at 480p, 81 frames: 21 x 30 x 52 = 32,760 tokens."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16,
        out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    )
    return model, {"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096)}


def wan_14b(layers: int) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 14B at 720p, 81 frames: 21 x 45 x 80 = 75,600 tokens."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16,
        out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    )
    return model, {"hidden_states": (1, 16, 21, 90, 160), "encoder_hidden_states": (1, 512, 4096)}


MODELS = {"wan-1.3b-480p": (wan_1_3b, 30), "wan-14b-720p": (wan_14b, 40)}


@torch.no_grad()
def measure(name: str, layers: int | None, repeats: int, small: bool, device: str) -> list[dict]:
    build, all_layers = MODELS[name]
    layers = layers or all_layers
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model, shapes = build(layers)
    model = model.to_empty(device=device).to(dtype).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    model.rope = type(model.rope)(128, (1, 2, 2), 1024).to(device)
    if small:
        shapes["hidden_states"] = (1, 16, 3, 20, 24)
    inputs = {k: torch.randn(v, device=device).to(dtype) for k, v in shapes.items()}
    inputs["timestep"] = torch.tensor([500], device=device)
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
