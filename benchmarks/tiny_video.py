"""Quality and time of FastDiff on the shipped video model, against stock with the same seeds.

python benchmarks/tiny_video.py --device cuda   # quality over 16 prompts x 2 seeds, and time
python benchmarks/tiny_video.py --quality off   # time of one denoiser forward only
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from clips import PROMPTS, decode, other_kernel, synchronize  # noqa: E402
from likeness import mean_ci, similarity  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.models import load  # noqa: E402

DENSITIES = (0.5, 0.25, 0.1)


def variants() -> list[tuple[str, dict[str, Any] | None]]:
    """Name and `enable` arguments of every run; None is stock."""
    common: dict[str, Any] = {"min_tokens": 1, "max_density": 1.0}
    rows: list[tuple[str, dict[str, Any] | None]] = [("stock", None), ("stock, other kernel", None)]
    for density in DENSITIES:
        knobs = {**common, "density": density}
        rows += [
            (f"tile-sparse {density}", {"method": "tile-sparse", **knobs}),
            (f"tile-sparse {density}, no tail", {"method": "tile-sparse", "tail": False, **knobs}),
            (f"tile-sparse {density}, sink 1", {"method": "tile-sparse", "sink": 1, **knobs}),
            (f"random-blocks {density}", {"method": "random-blocks", **knobs}),
        ]
    knobs = {**common, "method": "tile-sparse", "density": 0.25}
    rows += [
        ("tile-sparse 0.25, threshold", {**knobs, "select_by": "threshold"}),
        ("tile-sparse 0.1, threshold", {**knobs, "density": 0.1, "select_by": "threshold"}),
        ("tile-sparse 0.25, top-p", {**knobs, "select_by": "top-p"}),
        ("tile-sparse 0.25, reuse 4", {**knobs, "reuse": 4}),
        ("tile-sparse 0.25, no dense steps", {**knobs, "dense_steps": 0}),
    ]
    return rows


def set_variant(pipe: Any, knobs: dict[str, Any] | None) -> None:
    fastdiff.disable(pipe)
    if knobs is not None:
        options = dict(knobs)
        fastdiff.enable(pipe, options.pop("method"), strict=True, **options)


def quality(pipe: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant over all prompts and seeds.

    Each finished clip is a line of `--work`/seed-N.jsonl; a second run does only what is missing,
    and seeds can be shared among processes.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = PROMPTS[: args.prompts]
    for seed in args.seeds:
        path = args.work / f"seed-{seed}.jsonl"
        done = {(row["variant"], row["prompt"]) for row in _lines(path)}
        for begin in range(0, len(prompts), args.batch):
            part = prompts[begin : begin + args.batch]
            wanted = [(n, k) for n, k in variants() if any((n, p) not in done for p in part)]
            wanted = [(n, k) for n, k in wanted if not args.only or n in args.only]
            if not wanted:
                continue
            stock = decode(pipe, _latents(pipe, args, part, seed, begin, "stock", None)[0])
            for name, knobs in wanted:
                latents, row = _latents(pipe, args, part, seed, begin, name, knobs)
                psnr, ssim = similarity(decode(pipe, latents), stock)
                with path.open("a") as file:
                    for prompt, a, b in zip(part, psnr, ssim, strict=True):
                        line = {"variant": name, "prompt": prompt, "seed": seed, "psnr": a,
                                "ssim": b, **row}
                        file.write(json.dumps(line) + "\n")
                print(f"seed {seed} prompts {begin}+{len(part)} {name:<32} "
                      f"{sum(psnr) / len(psnr):6.2f} dB {row['seconds']:6.1f} s", flush=True)
    fastdiff.disable(pipe)
    return summary([row for path in sorted(args.work.glob("seed-*.jsonl")) for row in _lines(path)])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _latents(
    pipe: Any, args: argparse.Namespace, part: list[str], seed: int, begin: int, name: str,
    knobs: dict[str, Any] | None,
) -> tuple[Tensor, dict[str, float]]:
    set_variant(pipe, knobs)
    generators = [
        torch.Generator("cpu").manual_seed(1000 * seed + begin + i) for i in range(len(part))
    ]
    synchronize(args.device)
    start = time.perf_counter()
    with other_kernel(args.device) if name == "stock, other kernel" else nullcontext():
        latents = pipe(
            part, height=args.size, width=args.size, num_frames=args.frames,
            num_inference_steps=args.steps, guidance_scale=args.guidance,
            generator=generators, output_type="latent", max_sequence_length=args.text_tokens,
        ).frames
    synchronize(args.device)
    row = {"seconds": (time.perf_counter() - start) / len(part)}
    if knobs is not None:
        total = pipe.fastdiff.report.summary()
        row |= {"density": total["density"], "density_all_calls": total["density_all_calls"]}
    return latents, row


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: means with confidence, and paired differences to random tiles."""
    table: dict[str, dict[tuple[str, int], dict]] = {}
    for line in lines:
        table.setdefault(line["variant"], {})[line["prompt"], line["seed"]] = line
    rows = []
    for name, _ in variants():
        clips = table.get(name)
        if clips is None:
            continue
        density = name.partition(" ")[2].partition(",")[0]
        control = table.get(f"random-blocks {density}", {})
        paired = [clip["psnr"] - control[key]["psnr"] for key, clip in clips.items()
                  if key in control]
        first = next(iter(clips.values()))
        rows.append({
            "variant": name, "clips": len(clips),
            **{k: first[k] for k in ("density", "density_all_calls") if k in first},
            "psnr_db": mean_ci([clip["psnr"] for clip in clips.values()]),
            "ssim": mean_ci([clip["ssim"] for clip in clips.values()]),
            "psnr_over_random_db": mean_ci(paired) if paired else None,
            "seconds_a_clip": record.spread([clip["seconds"] for clip in clips.values()]),
            "psnr_each": [round(clip["psnr"], 3) for clip in clips.values()],
        })
    return rows


@torch.no_grad()
def forward_times(pipe: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One denoiser forward, all variants in turn, at several clip sizes."""
    rows = []
    # the variants whose cost differs
    timed = ["stock", *(f"tile-sparse {d}" for d in DENSITIES), "tile-sparse 0.25, no tail",
             "random-blocks 0.25"]
    model = pipe.transformer
    for frames, size in args.shapes:
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        edge = size // pipe.vae_scale_factor_spatial
        shape = (1, model.config.in_channels, latent_frames, edge, edge)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        latents = latents.to(args.device, model.dtype)
        text = torch.randn((1, args.text_tokens, model.config.text_dim),
                           generator=torch.Generator().manual_seed(1))
        text = text.to(args.device, model.dtype)
        timestep = torch.tensor([500], device=args.device)
        seconds: dict[str, list[float]] = {}
        errors: dict[str, float] = {}
        stock = None
        for repeat in range(-1, args.repeats):
            for name, knobs in variants():
                if name not in timed:
                    continue
                set_variant(pipe, knobs)
                synchronize(args.device)
                start = time.perf_counter()
                out = model(hidden_states=latents, timestep=timestep,
                            encoder_hidden_states=text, return_dict=False)[0]
                synchronize(args.device)
                last = time.perf_counter() - start
                stock = out if stock is None else stock
                errors[name] = float((out - stock).float().norm() / stock.float().norm())
                if repeat >= 0:
                    seconds.setdefault(name, []).append(last)
        tokens = latent_frames * (edge // 2) ** 2
        base = record.spread(seconds["stock"])["seconds"]
        for name, times in seconds.items():
            spread = record.spread(times)
            rows.append({"variant": name, "shape": [frames, size, size], "tokens": tokens,
                         "dtype": str(model.dtype), **spread,
                         "speedup": base / spread["seconds"], "relative_error": errors[name]})
            print(f"{tokens:>6} tokens {name:<32} {spread['seconds'] * 1e3:9.2f} ms "
                  f"{base / spread['seconds']:5.2f}x", flush=True)
    fastdiff.disable(pipe)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quality", choices=("on", "off"), default="on")
    parser.add_argument("--time", choices=("on", "off"), default="on")
    parser.add_argument("--prompts", type=int, default=16, help="of 32")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", nargs="*", default=[], help="variants to run, by their names")
    parser.add_argument("--work", type=Path, help="folder of finished clips, for resuming")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shapes", nargs="*", default=["33x256", "65x256"],
                        help="clip sizes for timing, frames x pixels")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 prompt, 2 steps")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes]
    if args.quick:
        args.prompts = args.batch = 1
        args.seeds = [0]
        args.steps, args.repeats, args.shapes = 2, 2, [(args.frames, args.size)]
    args.work = args.work or Path(tempfile.mkdtemp())
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = load(args.model, device=args.device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "device", "work")}
    for part, wanted, measure in (("quality", args.quality, quality),
                                  ("forward", args.time, forward_times)):
        if wanted == "on":
            suffix = "_quick" if args.quick else ""
            name = f"tiny_video_{part}_{args.device}{suffix}.json"
            path = args.output / name if args.output else record.RESULTS / name
            rows = measure(pipe, args)
            record.write(path, f"tiny_video_{part}", args.device, settings, rows)
            print(path)


if __name__ == "__main__":
    main()
