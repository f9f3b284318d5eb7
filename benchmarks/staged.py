"""Quality of staged sampling on the shipped models, against plain fewer steps of equal cost.

python benchmarks/staged.py --kind picture --samples 16 --seconds 170   # again until all is done
python benchmarks/staged.py --kind clip --device cuda --samples 128

Pictures differ from stock's by design, so likeness to stock says nothing here. What is measured,
by a classifier: does the picture show what was asked for; how near is the set to renders of the
same captions (kernel distance on the classifier's features, unbiased for small sets); sharpness.
"""

import argparse
import importlib
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from tiny_video import decode as decode_wan  # noqa: E402
from tiny_video import mean_ci, synchronize  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.models import find, load  # noqa: E402
from training.captions import MOTIONS, Scene, plain_caption  # noqa: E402
from training.classifier import DIRECTIONS, direction, displacement  # noqa: E402
from training.data import load_sprites, make_batch, render  # noqa: E402
from training.sampling import held_out_scenes  # noqa: E402


def variants() -> dict[str, dict[str, Any] | float | None]:
    """Every run: None is stock, a number is that fraction of its steps, else staged settings."""
    rows: dict[str, dict[str, Any] | float | None] = {"stock": None}
    for share in (0.75, 0.65, 0.5, 0.35, 0.25, 0.2):
        rows[f"{share:g} of the steps"] = share
    stages = {
        "1.5x": ("1:0.25, 0.5:0.6:0.9, 1:0.25:0.7", "1:0.25, 0.5:0.6:0.9, 1:0.25:0.7"),
        "2x": ("1:0.15, 0.5:0.4:0.9, 1:0.25:0.8", "1:0.15, 0.5:0.4:0.9, 1:0.25:0.75"),
        "3x": ("1:0.1, 0.5:0.35:0.9, 1:0.15:0.8", "1:0.1, 0.5:0.35:0.9, 1:0.15:0.75"),
        "4x": ("1:0.1, 0.5:0.2:0.9, 1:0.1:0.8", "1:0.1, 0.5:0.2:0.9, 1:0.1:0.75"),
    }
    for budget, (restart, going_on) in stages.items():
        rows[f"{budget} restart"] = {"stages": restart}
        rows[f"{budget} continue"] = {"stages": going_on, "transition": "continue"}
        rows[f"{budget} matched-noise"] = {"stages": going_on, "transition": "matched-noise"}
    rows |= {
        "2x restart, correlated noise": {"stages": stages["2x"][0], "noise": "correlated"},
        "2x restart, later and sharper": {"stages": "1:0.2, 0.5:0.4:0.8, 1:0.2:0.6"},
        "2x restart, scale 0.75": {"stages": "1:0.1, 0.75:0.35:0.9, 1:0.2:0.7"},
        "2x continue, scale 0.75": {"stages": "1:0.1, 0.75:0.35:0.95, 1:0.2:0.6",
                                    "transition": "continue"},
        "2x low to high, continue": {"stages": "0.5:0.4, 1:0.4:0.9", "transition": "continue"},
        "2x low to high, restart": {"stages": "0.5:0.4, 1:0.4:0.85"},
        "2x low to high, matched-noise": {"stages": "0.5:0.4, 1:0.4:0.9",
                                          "transition": "matched-noise"},
        "4x low to high, matched-noise": {"stages": "0.5:0.2, 1:0.2:0.9",
                                          "transition": "matched-noise"},
        "preset balanced": {"preset": "balanced"},
        "preset balanced, restart": {"preset": "balanced", "transition": "restart"},
        "preset fast": {"preset": "fast"},
        "preset video": {"preset": "video"},
    }
    return rows


def enter(pipe: Any, settings: dict[str, Any] | float | None) -> None:
    fastdiff.disable(pipe)
    if isinstance(settings, dict):
        # the shipped models say nothing of the sizes they were trained at
        fastdiff.enable(pipe, "bottleneck", force=True, **settings)


class Bench:
    """One model and kind: makes samples, counts their cost, judges them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = find(args.model)
        best = self.model.defaults
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.pipe = load(self.model, device=args.device, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.clip = args.kind == "clip"
        self.steps = args.steps or best.steps or 20
        size = args.size or best.height or 256
        self.call: dict[str, Any] = {
            "height": size, "width": size, "guidance_scale": best.guidance, **best.arguments}
        if best.frames:
            self.call["num_frames"] = best.frames if self.clip else 1
        self.judge = importlib.import_module(args.judge).load_judge(args.device)
        self.scenes = held_out_scenes(args.samples, clip=self.clip)

    def latents(self, begin: int, count: int, settings: Any, steps: int | None = None) -> Tensor:
        enter(self.pipe, settings)
        asked = steps or self.steps
        if isinstance(settings, float):
            asked = max(1, round(settings * asked))
        generators = [torch.Generator("cpu").manual_seed(begin + i) for i in range(count)]
        prompts = [plain_caption(scene) for scene in self.scenes[begin : begin + count]]
        out = self.pipe(prompts, generator=generators, num_inference_steps=asked,
                        output_type="latent", return_dict=False, **self.call)
        return out[0]

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Tensor:
        """[B, T, 3, E, E] in [0, 1], float32."""
        if type(self.pipe.vae).__name__ == "AutoencoderKLWan":
            return decode_wan(self.pipe, latents)
        height, width = self.call["height"], self.call["width"]
        if latents.ndim == 3:
            latents = self.pipe._unpack_latents(
                latents, height, width, self.pipe.vae_scale_factor)
        config = self.pipe.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pictures = self.pipe.vae.decode(latents.to(self.pipe.vae.dtype)).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)[:, None]

    @torch.no_grad()
    def look(self, frames: Tensor) -> dict[str, Tensor]:
        """What the judge says, and its features, all [B, T, ...] on the CPU."""
        flat = frames.flatten(0, 1)
        sharp = _sharpness(flat).unflatten(0, frames.shape[:2])
        if flat.shape[-1] != 256:
            flat = F.interpolate(flat, (256, 256), mode="area")
        kept: list[Tensor] = []
        hook = self.judge.late.register_forward_hook(
            lambda module, args, out: kept.append(out.mean((2, 3))))
        parts = [self.judge(part * 2 - 1) for part in flat.to(self.args.device).split(64)]
        hook.remove()
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        found |= {"features": torch.cat(kept)}
        found = {key: x.float().cpu().unflatten(0, frames.shape[:2]) for key, x in found.items()}
        return {**found, "sharpness": sharp.cpu()}

    def samples(self, begin: int, count: int, settings: Any) -> list[dict[str, Any]]:
        """One dict a sample."""
        synchronize(self.args.device)
        start = time.perf_counter()
        latents = self.latents(begin, count, settings)
        synchronize(self.args.device)
        seconds = (time.perf_counter() - start) / count
        seen = self.look(self.frames(latents))
        return [{"seconds": seconds, **self._told(seen, i, self.scenes[begin + i])}
                for i in range(count)]

    def _told(self, seen: dict[str, Tensor], i: int, scene: Scene) -> dict[str, Any]:
        row: dict[str, Any] = {
            "object": int(seen["object"][i].softmax(-1).mean(0).argmax() == scene.obj),
            "colour": int(seen["colour"][i].mean(0).argmax() == scene.colour),
            "pattern": int(seen["pattern"][i].mean(0).argmax() == scene.pattern),
            "object_every_frame":
                float((seen["object"][i].argmax(-1) == scene.obj).float().mean()),
            "sharpness": float(seen["sharpness"][i].mean()),
            "features": [round(x, 4) for x in seen["features"][i].mean(0).tolist()],
        }
        if self.clip and scene.motion is not None and MOTIONS[scene.motion] in DIRECTIONS:
            moved = displacement(seen["centre"][i : i + 1])
            row["direction"] = int(direction(moved)[0] == MOTIONS[scene.motion])
        return row

    def renders(self) -> list[dict[str, Any]]:
        """The same captions, drawn by the training world: what a perfect model would make."""
        frames = self.call.get("num_frames", 1)
        sprites = load_sprites(self.args.device)
        rows = []
        for i, scene in enumerate(self.scenes):
            batch = make_batch([scene], random.Random(i), frames)
            clip = render(batch, sprites, self.call["height"]).float() / 2 + 0.5
            rows.append({"seconds": 0.0, **self._told(self.look(clip), 0, scene)})
        return rows

    def flops(self, settings: Any) -> float:
        """Floating-point operations of one sample's denoising and prompt."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.latents(0, 1, settings)
        return float(counter.get_total_flops())


def _sharpness(frames: Tensor) -> Tensor:
    """Mean absolute Laplacian of the grey picture, [N]."""
    grey = frames.mean(1, keepdim=True)
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(grey, kernel).abs().mean((1, 2, 3))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel, as in KID; features are scaled by those of b.

    Row i of both shows the same caption, so a sample never meets its own twin.
    """
    scale = b.std(0).clamp_min(1e-3)
    a, b = (a - b.mean(0)) / scale, (b - b.mean(0)) / scale
    d = a.shape[1]

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    def mean(values: Tensor) -> Tensor:
        n = len(values)
        return (values.sum() - values.diagonal().sum()) / (n * (n - 1))

    return float(mean(k(a, a)) + mean(k(b, b)) - 2 * mean(k(a, b)))


def run(bench: Bench, args: argparse.Namespace) -> bool:
    """Add samples to the work folder until all are there or the time is over."""
    deadline = time.perf_counter() + args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = {name: s for name, s in variants().items() if not args.only or name in args.only}
    renders = args.work / "renders.json"
    if not renders.exists():
        renders.write_text(json.dumps(bench.renders()))
    for begin in range(0, args.samples, args.batch):
        count = min(args.batch, args.samples - begin)
        for name, settings in wanted.items():
            path = args.work / f"{name.replace(' ', '_').replace(',', '')}-{begin}.json"
            if path.exists():
                continue
            if time.perf_counter() > deadline:
                return False
            path.write_text(json.dumps({"variant": name, "rows": bench.samples(begin, count,
                                                                               settings)}))
            print(f"{begin}+{count} {name}", flush=True)
    costs = args.work / "flops.json"
    known = json.loads(costs.read_text()) if costs.exists() else {}
    for name, settings in wanted.items():
        if name not in known:
            if time.perf_counter() > deadline:
                return False
            known[name] = bench.flops(settings)
            costs.write_text(json.dumps(known))
    return True


def summary(work: Path) -> list[dict[str, Any]]:
    samples: dict[str, list[dict[str, Any]]] = {}
    # in the order of the captions
    for path in sorted(work.glob("*-*.json"), key=lambda p: int(p.stem.rpartition("-")[2])):
        found = json.loads(path.read_text())
        samples.setdefault(found["variant"], []).extend(found["rows"])
    renders = json.loads((work / "renders.json").read_text())
    costs = json.loads((work / "flops.json").read_text())
    real = torch.tensor([row["features"] for row in renders])
    rows = []
    for name in ["renders", *variants()]:
        found = renders if name == "renders" else samples.get(name)
        if not found:
            continue
        features = torch.tensor([row["features"] for row in found])
        row: dict[str, Any] = {
            "variant": name, "samples": len(found),
            "work": round(costs[name] / costs["stock"], 4) if name in costs else None,
            "kernel_distance": None if name == "renders" else kernel_distance(features, real),
        }
        for figure in ("object", "colour", "pattern", "object_every_frame", "direction",
                       "sharpness"):
            values = [float(sample[figure]) for sample in found if figure in sample]
            if values:
                row[figure] = mean_ci(values)
        if name in costs:
            row["seconds_a_sample"] = record.spread([sample["seconds"] for sample in found])
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        figures = " ".join(
            f"{name} {row[name]['mean']:.3f}" for name in
            ("object", "colour", "pattern", "direction", "sharpness") if name in row)
        distance = row["kernel_distance"]
        print(f"{row['variant']:<34} work {row['work'] or math.nan:5.3f} "
              f"distance {math.nan if distance is None else distance:8.4f} {figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--kind", choices=("picture", "clip"), default="picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--judge", default="training.judge",
                        help="module with load_judge(device), a classifier of the model's world")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="of stock; None takes the model's own")
    parser.add_argument("--size", type=int, help="pixels; None takes the model's own")
    parser.add_argument("--only", nargs="*", default=[], help="variants to run, by their names")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then; run again")
    parser.add_argument("--work", type=Path, help="folder of finished samples, for resuming")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.mkdtemp())
    bench = Bench(args)
    done = run(bench, args)
    if not done:
        print(f"stopped; run again with --work {args.work}")
        return
    rows = summary(args.work)
    show(rows)
    settings = {"model": args.model, "kind": args.kind, "samples": args.samples,
                "steps": bench.steps, "call": bench.call, "judge": args.judge,
                "variants": {k: v for k, v in variants().items() if v is not None}}
    name = f"staged_{args.model}_{args.kind}_{args.device}.json"
    record.write(args.output / name, "staged", args.device, settings, rows)
    print(args.output / name)


if __name__ == "__main__":
    main()
