"""How far the evaluator can be trusted: its accuracy on renders of pairs kept out of training.

python benchmarks/evaluator.py            # all, some minutes on a CPU
python benchmarks/evaluator.py --tiny     # a smoke run
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from training.captions import MOTIONS, Scene, held_out_pairs
from training.data import load_sprites, make_batch, random_scene, render
from training.evaluator import Evaluator
from training.sampling import held_out_scenes

BLURS = (1, 3, 7, 13)


def rendered(scenes: list[Scene], edge: int, frames: int, sprites: Tensor, seed: int) -> Tensor:
    """Video [B, T, 3, E, E] in [-1, 1]."""
    batch = make_batch(scenes, random.Random(seed), frames, frames)
    return torch.cat([render(batch[i : i + 8], sprites, edge) for i in range(0, len(scenes), 8)])


def blurred(frames: Tensor, window: int) -> Tensor:
    return F.avg_pool2d(frames, window, 1, window // 2, count_include_pad=False)


def pictures(judge: Evaluator, n: int, edges: list[int], sprites: Tensor) -> list[dict[str, Any]]:
    """Clean renders by size, and what blur does to the verdicts, sharpness and distance."""
    scenes = held_out_scenes(n, clip=False, seed=77)
    rows = []
    for edge in edges:
        frames = rendered(scenes, edge, 1, sprites, 1)[:, 0]
        again = rendered(scenes, edge, 1, sprites, 2)[:, 0]
        for window in BLURS if edge == edges[0] else BLURS[:1]:
            seen = blurred(frames, window)
            rows.append({"what": "pictures", "edge": edge, "blur_pixels": window,
                         **judge.pictures(seen, scenes, -1.0),
                         "distance_to_fresh_renders": judge.distance(seen, again, -1.0)})
            print(rows[-1], flush=True)
    return rows


def clips(judge: Evaluator, n: int, edge: int, sprites: Tensor) -> list[dict[str, Any]]:
    """Renders by motion: direction, stability of shape, and its fall where the object changes."""
    rng, pairs, rows = random.Random(5), held_out_pairs(), []
    for motion, name in enumerate(MOTIONS):
        scenes = []
        for _ in range(n):
            drawn = random_scene(rng, clip=True)
            obj, colour = rng.choice(pairs)
            scenes.append(Scene(obj, colour, drawn.pattern, motion, None))
        video = rendered(scenes, edge, 33, sprites, motion)
        other = [Scene((s.obj + 7) % 40, s.colour, s.pattern, motion, None) for s in scenes]
        changed = rendered(other, edge, 33, sprites, motion)
        weight = torch.linspace(0, 1, 33).view(1, 33, 1, 1, 1)
        weight = weight.to(video.device)
        morph = video * (1 - weight) + changed * weight
        rows.append({"what": "clips", "motion": name, "edge": edge,
                     **judge.clips(video, scenes, -1.0),
                     "shape_stability_of_morphs": judge.shape_stability(morph, -1.0).mean().item()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--clips", type=int, default=8, help="a motion")
    parser.add_argument("--edges", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--tiny", action="store_true", help="a smoke run")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS / "evaluator.json")
    args = parser.parse_args()
    if args.tiny:
        args.pictures, args.clips, args.edges = 4, 1, [64]
    judge, sprites = Evaluator(args.device), load_sprites(args.device, 448)
    rows = pictures(judge, args.pictures, args.edges, sprites)
    rows += clips(judge, args.clips, args.edges[0], load_sprites(args.device))
    settings = {k: getattr(args, k) for k in ("pictures", "clips", "edges")}
    record.write(args.output, "evaluator", args.device, settings, rows)


if __name__ == "__main__":
    main()
