"""Sixteen prompts as they come: the same prompts and seeds stock and with `enable_fastdiff()`.

python benchmarks/gallery.py --device cuda        # docs/images/gallery-* and results/gallery.json
python benchmarks/gallery.py --tiny -o /tmp/look  # a smoke run on a CPU

Prompts name pairs of object and background colour that training never showed, in turn; seeds are
0 to 15. Nothing is picked. `min_tokens=1` makes FastDiff sparse at sizes where it would step
aside because it gains no time there; what is shown is what sparse attention does to the result.
Pictures are made twice: with the default blocks of 64 tokens and with finer ones.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
import record  # noqa: E402
import sheets  # noqa: E402
from clips import Maker  # noqa: E402
from likeness import likeness, mean_ci  # noqa: E402

from fastdiff import models  # noqa: E402
from fastdiff.config import DEFAULT, make_methods  # noqa: E402
from training.captions import MOTIONS, NAMES, Scene, plain_caption  # noqa: E402
from training.evaluator import Evaluator  # noqa: E402
from training.sampling import held_out_scenes  # noqa: E402

COUNT, LIMIT = 16, 3_000_000
TILE, SMALL, MOVING, SHOWN, EVERY = 144, 80, 96, 6, 2
# model, kind, and what is changed besides min_tokens; pictures have few blocks of 64 tokens
FINE = {"tile": (1, 4, 4)}
SETS = (("tiny-image", "pictures", ({}, FINE)), ("tiny-video", "pictures", ({}, FINE)),
        ("tiny-video", "clips", ({},)))
VERDICTS = ("object", "colour", "pattern", "place")


@dataclass
class Set:
    """One model's results: stock, and a video and a row of figures for each variant of FastDiff.

    Videos are [N, T, 3, H, W] in [0, 1].
    """

    scenes: list[Scene]
    stock: Tensor
    fast: list[Tensor]
    rows: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        return self.rows[0]["kind"]

    def title(self, where: str) -> str:
        row = self.rows[0]
        frames = f", {row['frames']} frames" if row["frames"] > 1 else ""
        size = f"{row['size']} x {row['size']}{frames}"
        return f"{row['model']}, {size}; {where}: stock, then FastDiff"

    def told(self) -> list[str]:
        """A line for each variant: the call, and what came of it."""
        return [f"{row['call']}: density {row['density']:.2f} in sparse steps, "
                f"{row['operations']:.0%} of the attention in all; {row['psnr']['mean']:.1f} dB to "
                "stock" for row in self.rows]


def made(name: str, kind: str, changes: tuple[dict[str, Any], ...], judge: Evaluator,
         args: argparse.Namespace) -> Set:
    """Stock and fast results of one model for the fixed prompts, and what is measured of them."""
    model = models.find(name)
    best, clip = model.defaults, kind == "clips"
    pipe = models.load(model, args.device)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts, clip)
    prompts, seeds = [plain_caption(scene) for scene in scenes], list(range(len(scenes)))
    size = args.size or best.height
    frames = (args.frames or best.frames or 1) if clip else 1
    call: dict[str, Any] = {"height": size, "width": size, **best.arguments,
                            "num_inference_steps": args.steps or best.steps}
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    if best.guidance is not None:
        call["guidance_scale"] = best.guidance
    if "video" in best.kind:
        call["num_frames"] = frames
    maker = Maker(pipe, call, args.device)
    stock, _ = maker.make(prompts, seeds, None)
    found = Set(scenes, stock.cpu(), [], [])
    of_stock = [verdicts(judge, video, scene) for video, scene in zip(stock, scenes, strict=True)]
    for change in changes:
        options = {"min_tokens": 1, **change, **args.options}
        method, = make_methods([args.method], options)
        fast, about = maker.make(prompts, seeds, method)
        near = likeness(fast, stock)
        each = [{"prompt": prompts[i], "seed": seeds[i], **near[i], "stock": of_stock[i],
                 "fast": verdicts(judge, fast[i], scene)} for i, scene in enumerate(scenes)]
        row = {"model": name, "sha256": model.sha256, "kind": kind, "size": size, "frames": frames,
               "steps": call["num_inference_steps"], "guidance": best.guidance,
               "method": method.to_dict(), "call": called(args.method, options),
               **{k: about[k] for k in ("density", "operations", "sparse_calls", "fallbacks")},
               **{k: mean_ci([one[k] for one in near]) for k in ("psnr", "ssim", "features")},
               "stock": judge.clips(stock, scenes), "fast": judge.clips(fast, scenes),
               "distance": judge.distance(fast.flatten(0, 1), stock.flatten(0, 1)), "each": each}
        print({k: v for k, v in row.items() if k not in ("each", "method")}, flush=True)
        found.fast.append(fast.cpu())
        found.rows.append(row)
    return found


def called(method: str, options: dict[str, Any]) -> str:
    """What a user would write."""
    words = [] if method == DEFAULT else [repr(method)]
    return f"enable_fastdiff({', '.join([*words, *(f'{k}={v!r}' for k, v in options.items())])})"


def verdicts(judge: Evaluator, video: Tensor, scene: Scene) -> dict[str, bool]:
    """Which parts of the prompt the evaluator finds in one clip [T, 3, H, W]."""
    found = judge.clips(video[None], [scene])
    asked = VERDICTS
    if scene.motion is not None:
        asked += (MOTIONS[scene.motion].replace(" ", "_"),)
    return {k: found[k] == 1 for k in asked if k in found}


def pictures_sheet(sets: list[Set]) -> Image.Image:
    """Of each model stock above its variants, eight prompts a row."""
    blocks = []
    for found in sets:
        columns = []
        drawn = [sheets.tiles(video[:, 0], TILE) for video in (found.stock, *found.fast)]
        for i, parts in enumerate(zip(*drawn, strict=True)):
            near = ", ".join(f"{row['each'][i]['psnr']:.1f}" for row in found.rows)
            columns.append(sheets.below([*parts, sheets.text(f"{i + 1}: {near} dB", TILE)], 2))
        body = sheets.grid(columns, 8)
        words = [found.title("from above"), *found.told()]
        blocks.append(sheets.below([*(sheets.text(line, body.width) for line in words), body], 2))
    return sheets.below(blocks, sheets.GAP)


def clips_sheet(found: Set) -> Image.Image:
    """Six frames of each clip, stock left and FastDiff right."""
    index = torch.linspace(0, found.stock.shape[1] - 1, SHOWN).round().long()
    rows = []
    for i, line in enumerate(found.rows[0]["each"]):
        sides = [sheets.beside(sheets.tiles(video[i, index], SMALL), 2)
                 for video in (found.stock, found.fast[0])]
        body = sheets.beside(sides, sheets.GAP)
        words = f"{i + 1}: {line['prompt']}; {line['psnr']:.1f} dB"
        rows.append(sheets.below([body, sheets.text(words, body.width)]))
    words = [found.title("from the left"), *found.told()]
    return sheets.below([*(sheets.text(line, rows[0].width) for line in words), *rows], 2)


def animation(found: Set) -> list[Image.Image]:
    """All clips at once, stock and FastDiff side by side, every second frame."""
    frames, both = [], [video[:, ::EVERY] for video in (found.stock, found.fast[0])]
    for moment in range(both[0].shape[1]):
        pairs = []
        sides = [sheets.tiles(video[:, moment], MOVING) for video in both]
        for i, (stock, fast) in enumerate(zip(*sides, strict=True)):
            scene = found.scenes[i]
            words = f"{i + 1} {NAMES[scene.obj]} {MOTIONS[scene.motion or 0]}"
            pair = sheets.beside([stock, fast], 2)
            pairs.append(sheets.below([pair, sheets.text(words, pair.width)]))
        frames.append(sheets.grid(pairs, 4))
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", default=DEFAULT, help="a preset or a method")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help='a knob of the method in JSON, such as "tile=[1,4,4]"')
    parser.add_argument("--prompts", type=int, default=COUNT)
    parser.add_argument("--steps", type=int, help="instead of each model's own")
    parser.add_argument("--size", type=int, help="instead of each model's own")
    parser.add_argument("--frames", type=int, help="of a clip, instead of the model's own")
    parser.add_argument("--tiny", action="store_true", help="2 prompts, 3 steps, small")
    parser.add_argument("-o", "--output", type=Path,
                        help="folder for all files; default: docs/images and benchmarks/results")
    args = parser.parse_args()
    args.options = {k: json.loads(v) for k, v in (o.split("=", 1) for o in args.option)}
    if args.tiny:
        args.prompts, args.steps, args.size, args.frames = 2, 3, 128, 9
        if args.output is None:
            parser.error("--tiny needs -o FOLDER: its pictures are not the documented ones")
    images = args.output or HERE.parent / "docs/images"
    judge = Evaluator(args.device)
    sets = [made(name, kind, changes, judge, args) for name, kind, changes in SETS]
    sheets.save_png(pictures_sheet([s for s in sets if s.kind == "pictures"]),
                    images / "gallery-pictures.png", 256)
    clips = next(s for s in sets if s.kind == "clips")
    sheets.save_png(clips_sheet(clips), images / "gallery-clips.png", 256)
    rate = models.defaults(clips.rows[0]["model"]).fps or 16
    sheets.save_gif(animation(clips), images / "gallery-clips.gif", 1000 * EVERY // rate, LIMIT)
    settings = {"prompts": "held-out pairs in turn", "count": args.prompts, "seeds": "0 onwards",
                "method": args.method, "options": args.options, "tiny": args.tiny}
    record.write((args.output or record.RESULTS) / "gallery.json", "gallery", args.device, settings,
                 [row for s in sets for row in s.rows])


if __name__ == "__main__":
    main()
