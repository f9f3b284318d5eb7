"""Quality of clips made beyond the trained size, on the shipped video model.

python benchmarks/freeswim.py --device cuda -o DIR        # 2x and 3x the side, about 150 s
python benchmarks/freeswim.py --samples 1 --sides 2 --frames 5 --steps 4   # a look on a CPU

Every way begins with the same clips of the model's own size. Measured: repetition (a frame against
itself shifted by half its sides, and its largest self-likeness at any far shift), prompt control by
the classifier of training/evaluator.py, sharpness, and how near the clip is to the one it began
with. Clips of two prompts are put side by side as pictures and as a GIF.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from clips import PROMPTS, decode, synchronize  # noqa: E402
from likeness import mean_ci  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.models import find, load  # noqa: E402
from fastdiff.policies.tile_sparse import TileSparse  # noqa: E402
from training.evaluator import Evaluator  # noqa: E402

# knobs of FreeSwim; the two that begin without a clip are None
NATIVE, RESIZED, STOCK = "native size", "resized", "stock at the large size"
WAYS: dict[str, dict[str, Any] | None] = {
    RESIZED: None,
    STOCK: None,
    "dense second stage": {"mode": "dense"},
    "windows only": {"mode": "window"},
    "windows only, by tile": {"mode": "window", "slide": "tile"},
    "dual, nocache": {"mode": "nocache"},
    "dual, cache 2": {"interval": 2},
    "dual, cache 5": {"interval": 5},
    "dual, cache 2, by tile": {"interval": 2, "slide": "tile"},
    "dual, cache 2, 8-bit": {"interval": 2, "cache": "device-8-bit"},
    "dual, cache 2, sparse guide": {"interval": 2},
}
SHOWN = (NATIVE, STOCK, "windows only", "dual, nocache", "dual, cache 2", "dual, cache 5")
# pixels of a picture in the sheet and in the GIF
CELL, FILM = 160, 112


def repetition(frames: Tensor) -> tuple[Tensor, Tensor]:
    """How alike frames [N, 3, H, W] are to themselves shifted; two figures each, [N].

    Correlation of the frame with itself over all circular shifts, at 64 x 64, mean of each colour
    taken out. First: the largest at half the height, half the width, or both. Second: the largest
    over all shifts that are at least a quarter of the frame long.
    """
    small = F.interpolate(frames.float(), (64, 64), mode="area")
    centred = small - small.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centred).abs().square().sum(1)
    found = torch.fft.ifft2(power).real
    found = found / found[:, :1, :1].clamp_min(1e-6)
    half = torch.stack([found[:, 32, 0], found[:, 0, 32], found[:, 32, 32]]).amax(0)
    at = torch.arange(64, device=frames.device)
    away = torch.minimum(at, 64 - at)
    far = (away[:, None] ** 2 + away**2) >= 16**2
    return half, found[:, far].amax(1)


class Bench:
    """The model and the judge; makes clips and says what they show."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        model = find("tiny-video")
        best = model.defaults
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.pipe = load(model, device=self.device, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.side = best.height or 256
        self.call = {"height": self.side, "width": self.side, "guidance_scale": best.guidance,
                     "num_inference_steps": args.steps, "output_type": "latent",
                     "return_dict": False, "num_frames": args.frames or best.frames,
                     **best.arguments}
        self.judge = Evaluator(self.device)

    def made(self, begin: int, prompts: list[str], **changes: Any) -> Tensor:
        """Stock clips, [B, T, 3, H, W] in 0..1."""
        return decode(self.pipe, self.pipe(prompts, generator=self._seeds(begin, prompts),
                                           **{**self.call, **changes})[0])

    def larger(self, begin: int, prompts: list[str], clips: Tensor, way: str,
               side: int) -> tuple[Tensor, dict[str, Any]]:
        """Clips made one of the ways at `side`, and what the report said."""
        if way == RESIZED:
            flat = F.interpolate(clips.flatten(0, 1), (side, side), mode="bilinear")
            return flat.unflatten(0, clips.shape[:2]), {}
        if way == STOCK:
            return self.made(begin, prompts, height=side, width=side), {}
        if "sparse guide" in way:
            fastdiff.enable(self.pipe, TileSparse(density=0.25, dense_steps=0, min_tokens=1,
                                                  max_density=1.0))
        said: dict[str, Any] = {}

        def note(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            said.update(pipe.fastdiff.report.methods.get("freeswim", {}))
            return tensors

        knobs = {"shift": self.args.shift, "strength": self.args.strength, **(WAYS[way] or {})}
        latents = fastdiff.upscale_video(
            self.pipe, prompts, target=(side, side), video=clips,
            generator=self._seeds(begin, prompts), callback_on_step_end=note,
            **{k: v for k, v in knobs.items() if v is not None}, **self.call)[0]
        fastdiff.disable(self.pipe)
        return decode(self.pipe, latents), said

    def _seeds(self, begin: int, prompts: list[str]) -> list[torch.Generator]:
        return [torch.Generator("cpu").manual_seed(begin + i) for i in range(len(prompts))]

    def figures(self, video: Tensor, clips: Tensor, prompts: list[str]) -> list[dict[str, float]]:
        """One dict a clip."""
        rows = []
        for one, native, prompt in zip(video, clips, prompts, strict=True):
            half, far = repetition(one)
            said = self.judge.clips(one[None], [prompt])
            small = F.interpolate(one.float(), native.shape[-2:], mode="area")
            error = (small - native.float()).square().mean().clamp_min(1e-10)
            rows.append({
                "repetition_half": float(half.mean()), "repetition_far": float(far.mean()),
                "psnr_to_first_clip": float(-10 * torch.log10(error)),
                **{name: float(said[name]) for name in
                   ("object", "object_every_frame", "colour", "pattern", "direction", "sharpness",
                    "shape_stability") if name in said and said[name] is not None},
            })
        return rows


def run(bench: Bench, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all sides and ways, and the frames that are shown."""
    prompts = PROMPTS[: args.samples]
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    native = [bench.made(i * args.batch, batch) for i, batch in enumerate(batches)]
    found: dict[tuple[int, str], dict[str, Any]] = {}
    shown: dict[str, Any] = {}

    def note(side: int, way: str, batch: int, video: Tensor, seconds: float,
             said: dict[str, Any]) -> None:
        entry = found.setdefault((side, way), {"rows": [], "seconds": [], "said": said})
        entry["rows"] += bench.figures(video, native[batch], batches[batch])
        entry["seconds"].append(seconds / len(video))
        if batch == 0:
            shown[f"{side} {way}"] = video[: args.shown].float().cpu()

    for i, clips in enumerate(native):
        note(bench.side, NATIVE, i, clips, 0.0, {})
    ways = [way for way in WAYS if not args.only or way in args.only]
    for side in (bench.side * times for times in args.sides):
        for i, batch in enumerate(batches):
            for way in ways:
                synchronize(bench.device)
                begin = time.perf_counter()
                video, said = bench.larger(i * args.batch, batch, native[i], way, side)
                synchronize(bench.device)
                seconds = time.perf_counter() - begin
                note(side, way, i, video, seconds, said)
                print(f"{side} {i} {way:<28} {seconds:7.2f} s", flush=True)
    rows = []
    for (side, way), entry in found.items():
        names = entry["rows"][0]
        row = {"side": side, "variant": way, "samples": len(entry["rows"]),
               **{name: mean_ci([r[name] for r in entry["rows"] if name in r]) for name in names}}
        if way not in (NATIVE, RESIZED):
            row["seconds_a_clip"] = record.spread(entry["seconds"])
        rows.append({**row, "report": entry["said"]})
    return rows, shown


def sheet(shown: dict[str, Any], ways: list[str], prompts: int, frame: Callable[[int], int],
          size: int) -> Image.Image:
    """One picture: a column a way, a row a prompt."""
    strip = 14
    page = Image.new("RGB", (len(ways) * (size + 2), prompts * (size + 2) + strip), "white")
    draw = ImageDraw.Draw(page)
    for x, way in enumerate(ways):
        draw.text((x * (size + 2) + 2, 1), way.partition(" ")[2][: size // 6], fill="black")
        clips = shown[way]
        for y in range(min(prompts, len(clips))):
            one = clips[y, frame(clips.shape[1])]
            small = F.interpolate(one[None], (size, size), mode="area")[0]
            pixels = (small.movedim(0, -1) * 255).round().clamp(0, 255).byte().numpy()
            page.paste(Image.fromarray(pixels), (x * (size + 2), strip + y * (size + 2)))
    return page


def pictures(shown: dict[str, Any], bench: Bench, args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    for times in args.sides:
        side = bench.side * times
        ways = [f"{bench.side} {NATIVE}"] + [f"{side} {way}" for way in WAYS if way != RESIZED]
        ways = [way for way in ways if way in shown]
        page = sheet(shown, ways, args.shown, lambda frames: frames // 2, CELL)
        page.quantize(255).save(args.output / f"freeswim-{times}x.png", optimize=True)
        film = [way for way in ways if way.partition(" ")[2] in SHOWN]
        frames = [sheet(shown, film, min(2, args.shown), lambda _, t=t: t, FILM).quantize(96)
                  for t in range(0, bench.call["num_frames"], 2)]
        frames[0].save(args.output / f"freeswim-{times}x.gif", save_all=True, loop=0,
                       append_images=frames[1:], duration=125, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sides", type=int, nargs="*", default=[2, 3],
                        help="times the trained side")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--frames", type=int, help="of a clip; None takes the model's own")
    parser.add_argument("--strength", type=float, help="None takes the method's own")
    parser.add_argument("--shift", type=float, help="None takes the method's own")
    parser.add_argument("--only", nargs="*", default=[], choices=list(WAYS), help="ways to run")
    parser.add_argument("--shown", type=int, default=4, help="prompts in the pictures")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    bench = Bench(args)
    begin = time.perf_counter()
    with torch.inference_mode():
        rows, shown = run(bench, args)
    settings = {"model": "tiny-video", "steps": args.steps, "samples": args.samples,
                "frames": bench.call["num_frames"], "native": bench.side,
                "strength": args.strength, "shift": args.shift,
                "prompts": PROMPTS[: args.samples]}
    record.write(args.output / f"freeswim_{args.device}.json", "freeswim", args.device, settings,
                 rows)
    pictures(shown, bench, args)
    for row in rows:
        figures = " ".join(f"{name} {row[name]['mean']:.3f}" for name in
                           ("repetition_half", "repetition_far", "object", "object_every_frame",
                            "colour", "direction", "sharpness") if name in row)
        print(f"{row['side']:>4} {row['variant']:<28} {figures}")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
