"""What the small models can do: held-out prompts through the genuine pipelines, judged.

python benchmarks/ability.py --model tiny-video --device cuda   # results/tiny_video_ability.json
python benchmarks/ability.py --device cuda                      # all shipped models, a file each
python benchmarks/ability.py --tiny                             # a smoke run on a CPU

Prompts name pairs of object and background colour that training never showed, in turn. Whatever
comes out counts: nothing is picked. Seeds are the index of the first prompt of each call.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from fastdiff.models import Defaults, Model, find, load, shipped
from training.captions import plain_caption
from training.evaluator import Evaluator
from training.sampling import held_out_scenes
from training.sheets import grid, stack, strips

# larger than their own, where a model was trained for more
EDGES = {"tiny-video": [384, 512], "tiny-image": [768, 1024]}


def call(pipe: Any, prompts: list[str], size: int, frames: int | None, seed: int,
         defaults: Defaults, steps: int | None) -> Tensor:
    """Frames [B, T, 3, size, size] in [0, 1] by one plain call; `frames` is None for pictures."""
    arguments = {"height": size, "width": size, **defaults.arguments,
                 "num_inference_steps": steps or defaults.steps}
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    if defaults.guidance is not None:
        arguments["guidance_scale"] = defaults.guidance
    if "video" in defaults.kind:
        arguments["num_frames"] = frames or 1
    generator = torch.Generator(pipe.device).manual_seed(seed)
    out = pipe(prompts, generator=generator, output_type="pt", **arguments)
    found = out.frames if hasattr(out, "frames") else out.images[:, None]
    return found.float().cpu()


def measure(model: Model, judge: Evaluator, args: argparse.Namespace,
            deadline: float) -> tuple[list[dict[str, Any]], list[Any]]:
    """One row for each kind and size, and a contact sheet of the first samples of each."""
    dtype = getattr(torch, args.dtype)
    pipe = load(model, args.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    defaults, rows, sheets = model.defaults, [], []
    base = args.size or defaults.height or 256
    edges = EDGES.get(model.name, []) if args.edges is None else args.edges
    plans = [("pictures", base, None, args.pictures, args.batch)]
    part = max(1, args.batch // 4)
    if "video" in defaults.kind:
        plans = [("clips", base, defaults.frames, args.clips, part), *plans]
        plans += [("clips", edge, defaults.frames, args.large, max(1, part // 4)) for edge in edges]
    else:
        plans += [("pictures", edge, None, args.large, part) for edge in edges]
    for kind, size, frames, n, part in plans:
        scenes = held_out_scenes(n, clip=kind == "clips")
        prompts, found, begin = [plain_caption(s) for s in scenes], [], time.perf_counter()
        for i in range(0, n, part):
            if time.monotonic() >= deadline:
                break
            found.append(call(pipe, prompts[i : i + part], size, frames, i, defaults, args.steps))
        if not found:
            break
        video = torch.cat(found)
        seconds = (time.perf_counter() - begin) / len(video)
        figures = judge.clips(video, scenes[: len(video)])
        rows.append({"model": model.name, "sha256": model.sha256, "kind": kind, "size": size,
                     "frames": frames, "seconds_a_sample": seconds, **figures})
        print(rows[-1], flush=True)
        signed = video * 2 - 1
        sheets.append(strips(signed[:16], 8, 128, prompts[:16]) if kind == "clips"
                      else grid(signed[:32, 0], 8, 160, prompts[:32]))
    return rows, sheets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(shipped()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--large", type=int, default=32, help="pictures of each larger size")
    parser.add_argument("--edges", type=int, nargs="*", help="larger sizes; default: each model's")
    parser.add_argument("--size", type=int, help="instead of each model's own")
    parser.add_argument("--steps", type=int, help="instead of each model's own")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no call begins after it")
    parser.add_argument("--tiny", action="store_true", help="a smoke run: 2 samples, 2 steps")
    parser.add_argument("--sheets", type=Path, help="a PNG of the first samples")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS,
                        help="folder for NAME_ability.json; for one model also a .json file")
    args = parser.parse_args()
    single = args.output.suffix == ".json"
    if single and len(args.model) > 1:
        parser.error(f"-o {args.output} is one file for {len(args.model)} models: name a folder")
    if args.tiny:
        args.pictures = args.clips = args.batch = 2
        args.steps, args.edges, args.size = 2, [], args.size or 64
        if args.output == record.RESULTS:
            args.output = Path(tempfile.mkdtemp())
    deadline, judge = time.monotonic() + args.seconds, Evaluator(args.device)
    sheets = []
    for name in args.model:
        if time.monotonic() < deadline:
            rows, shown = measure(find(name), judge, args, deadline)
            sheets += shown
            # written after each model: a later failure loses nothing
            keys = ("dtype", "steps", "batch", "pictures", "clips", "large")
            settings = {"prompts": "held-out pairs", **{k: getattr(args, k) for k in keys}}
            own = args.output / f"{Path(name).name.replace('-', '_')}_ability.json"
            path = args.output if single else own
            record.write(path, "ability", args.device, settings, rows)
            print(path)
            if args.sheets is not None:
                stack(sheets, args.sheets)


if __name__ == "__main__":
    main()
