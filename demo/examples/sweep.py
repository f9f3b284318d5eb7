"""Sweep densities, compare each result with stock, and plot what is lost and what is saved.

python demo/examples/sweep.py out/ --densities 0.1 0.2 0.3 0.5 --seeds 1 2 --set size=128 steps=8
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw

from fastdiff.batch import run

PROMPTS = ("a red apple on a blue background", "a sailboat on a cyan background",
           "a hamburger on a striped green background")
WIDTH, HEIGHT, EDGE = 640, 400, 64


def psnr(one: Path, two: Path) -> float:
    """dB between two pictures, or two clips over all frames; 99 when equal."""
    difference = iio.imread(one).astype(float) - iio.imread(two).astype(float)
    error = float((difference ** 2).mean()) / 255 ** 2
    return 99.0 if error == 0 else -10 * math.log10(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--method", default="tile-sparse")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    defaults = {"kind": "image", **dict(word.split("=", 1) for word in args.set)}
    # small pictures are short sequences, which stay dense unless told otherwise
    sparse = {"method": args.method, "min_tokens": 1, "max_density": 1}
    jobs = [{"prompt": prompt, "seed": seed, **how}
            for prompt in args.prompts for seed in args.seeds
            for how in [{"method": "stock"},
                        *({**sparse, "density": density} for density in args.densities)]]
    outcome = run(jobs, args.out, defaults=defaults, on_event=lambda event: print(
        event.get("file") or event.get("error") or event["event"]))
    if not outcome.ok:
        sys.exit(f"failed: {outcome.failed}")

    lost, saved = defaultdict(list), defaultdict(list)
    each = 1 + len(args.densities)
    results = [path for path in outcome.results if path is not None]
    for begin in range(0, len(jobs), each):
        stock, *fast = results[begin: begin + each]
        for density, path in zip(args.densities, fast, strict=True):
            report = json.loads(Path(f"{path}.json").read_text())["report"]
            lost[density].append(psnr(stock, path))
            saved[density].append(report["density_all_calls"])
    rows = [{"density": density, "psnr": statistics.mean(lost[density]),
             "computed": statistics.mean(saved[density]), "results": len(lost[density])}
            for density in sorted(args.densities)]
    (args.out / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"density {row['density']:g}: PSNR {row['psnr']:.1f} dB, "
              f"{row['computed']:.0%} of the attention computed, over {row['results']} results")
    plot(rows).save(args.out / "sweep.png")
    print(args.out / "sweep.png")


def plot(rows: list[dict[str, Any]]) -> Image.Image:
    """PSNR (blue, left scale) and the computed share (orange, right scale) over density."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    most = max(10.0, math.ceil(max(row["psnr"] for row in rows) / 10) * 10)

    def at(x: float, y: float) -> tuple[float, float]:
        """x, y in 0..1."""
        return EDGE + x * (WIDTH - 2 * EDGE), HEIGHT - EDGE - y * (HEIGHT - 2 * EDGE)

    for i in range(6):
        draw.line([at(0, i / 5), at(1, i / 5)], fill="#dddddd")
        left, y = at(0, i / 5)
        draw.text((left - 8, y), f"{most * i / 5:.0f}", fill="#1f5fa8", anchor="rm")
        right, y = at(1, i / 5)
        draw.text((right + 8, y), f"{i * 20} %", fill="#c05a00", anchor="lm")
    xs = np.linspace(0.05, 0.95, len(rows)) if len(rows) > 1 else np.array([0.5])
    for x, row in zip(xs, rows, strict=True):
        place = at(float(x), 0)
        draw.text((place[0], place[1] + 8), f"{row['density']:g}", fill="black", anchor="mt")
    for key, scale, colour in (("psnr", most, "#1f5fa8"), ("computed", 1.0, "#c05a00")):
        points = [at(float(x), row[key] / scale) for x, row in zip(xs, rows, strict=True)]
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    draw.text((WIDTH / 2, HEIGHT - 20), "density asked for", fill="black", anchor="mm")
    draw.text((EDGE, EDGE - 24), "PSNR to stock, dB", fill="#1f5fa8", anchor="lm")
    draw.text((WIDTH - EDGE, EDGE - 24), "attention computed", fill="#c05a00", anchor="rm")
    return image


if __name__ == "__main__":
    main()
