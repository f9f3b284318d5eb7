"""Every attention method on a shipped model: how near to stock, at what density, in what time.

python benchmarks/methods.py                                   # 32 prompts x 2 seeds, resumable
python benchmarks/methods.py --density 0.1 --plan plan.json    # a calibrated plan is one more row
python benchmarks/methods.py --tiny                            # a smoke run, a minute on a CPU

`fastdiff bench methods` is the same. sparse-vdit is calibrated first, on prompts of its own. A run
that was stopped goes on where it was.
"""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import forward_time  # noqa: E402
import knobs  # noqa: E402
import record  # noqa: E402
from clips import PROMPTS, Maker, other_kernel  # noqa: E402
from likeness import FEATURES, likeness, mean_ci, paired  # noqa: E402

from fastdiff import calibration, models  # noqa: E402
from fastdiff.config import from_plan  # noqa: E402
from fastdiff.policies import Policy  # noqa: E402
from fastdiff.policies.sparse_vdit import SparseVDiT  # noqa: E402

FLOOR = "stock, other kernel"
Bar = Callable[[str, int, int], None]


class Rows:
    """What is compared: name -> method (None: stock), with changes of the call."""

    def __init__(self) -> None:
        self.methods: dict[str, Policy | None] = {FLOOR: None}
        self.changes: dict[str, dict[str, Any]] = {FLOOR: {}}

    def add(self, name: str, method: Policy | None, **changes: Any) -> None:
        self.methods[name], self.changes[name] = method, changes


def rows_of(args: argparse.Namespace, maker: Maker, bar: Bar) -> Rows:
    rows = Rows()
    for name in args.methods:
        if name == SparseVDiT.name:
            rows.add(name, _searched(args, maker, bar))
        else:
            rows.add(name, knobs.method(name, args.density, dense_steps=args.dense_steps,
                                        **args.options))
    for path in args.plan:
        method = from_plan(path)[0]
        if not isinstance(method, Policy):
            raise ValueError(f"{str(path)!r} is no plan of an attention method")
        rows.add(f"{method.name}, {path.stem}", method)
    return rows


def _searched(args: argparse.Namespace, maker: Maker, bar: Bar) -> Policy:
    """sparse-vdit with the table of a search at this density, prompts unlike the measured ones."""
    base = SparseVDiT(density=args.density, dense_steps=args.dense_steps, min_tokens=1,
                      max_density=1.0, **args.options)
    asked = calibration.prompts("default")[: 1 if args.tiny else 4]
    work = calibration.Work(args.work / f"search-{args.density:g}",
                            {"call": maker.call, "prompts": asked, "base": base.to_dict()})
    runs = calibration.Runs(maker.pipe, asked, maker.call, work, 1000,
                            lambda what, step, of: bar(f"calibrating: {what}", step, of))
    rules = calibration.Rules(rounds=1 if args.tiny else 2)
    return calibration.calibrate(runs, base, calibration.Goal(density=args.density), rules=rules)


def fewer_steps(args: argparse.Namespace, times: list[dict]) -> tuple[int, float] | None:
    """Steps that stock makes in the time of our method, and that share of stock's time.

    None where our method is not faster here and no --share was given.
    """
    share = args.share
    if share is None:
        ours = next(row for row in times if row["variant"] == knobs.OURS)
        dense = math.ceil(args.dense_steps * args.steps) / args.steps
        share = dense + (1 - dense) / ours["speedup"]
    steps = round(share * args.steps)
    return (max(1, steps), share) if steps < args.steps else None


def quality(args: argparse.Namespace, maker: Maker, rows: Rows, bar: Bar) -> dict[str, dict]:
    """Per row and (prompt, seed): likeness to stock, seconds, realised density."""
    work = calibration.Work(args.work / "clips", {"call": maker.call, "batch": args.batch})
    prompts = PROMPTS[: args.prompts]
    batches = [(seed, begin) for seed in args.seeds
               for begin in range(0, len(prompts), args.batch)]
    found: dict[str, dict] = {name: {} for name in rows.methods}
    total, number = len(batches) * len(rows.methods), 0
    for seed, begin in batches:
        part = prompts[begin: begin + args.batch]
        seeds = [1000 * seed + begin + i for i in range(len(part))]
        stock: list[torch.Tensor] = []

        def one(name: str, part: list[str] = part, seeds: list[int] = seeds,
                stock: list[torch.Tensor] = stock) -> list[dict[str, Any]]:
            if not stock:
                stock.append(maker.make(part, seeds, None)[0])
            with other_kernel(maker.device) if name == FLOOR else nullcontext():
                clips, about = maker.make(part, seeds, rows.methods[name], **rows.changes[name])
            return [{**near, **about} for near in likeness(clips, stock[0])]

        for name, method in rows.methods.items():
            bar(f"seed {seed}, prompts {begin + 1} to {begin + len(part)}: {name}", number, total)
            number += 1
            # a row of other options is other work
            key = _key(name, method, rows.changes[name], len(part), seed, begin)
            lines = work.part(key, lambda name=name, one=one: one(name))
            found[name] |= {(prompt, seed): line for prompt, line in
                            zip(part, lines, strict=True)}
    bar("clips", total, total)
    return found


def _key(name: str, method: Policy | None, changes: dict, count: int, seed: int, begin: int) -> str:
    import hashlib

    about = repr((name, None if method is None else sorted(method.to_dict().items()), changes,
                  count))
    return f"{hashlib.sha256(about.encode()).hexdigest()[:16]}-{seed}-{begin}"


def summary(args: argparse.Namespace, rows: Rows, found: dict[str, dict], times: list[dict]
            ) -> list[dict[str, Any]]:
    """One row a method: means with confidence, paired differences, density, seconds."""
    timed = {row["variant"]: row for row in times}
    out = []
    for name, method in rows.methods.items():
        clips = found[name]
        one = next(iter(clips.values()))
        dense = 0.0 if method is None else method._dense_steps(args.steps) / args.steps
        row: dict[str, Any] = {"variant": name, "clips": len(clips),
                               "control": knobs.CONTROLS.get(name, ""), **rows.changes[name]}
        if method is not None:
            sparse, operations = (sum(clip[k] for clip in clips.values()) / len(clips)
                                  for k in ("density", "operations"))
            row |= {"density_sparse_steps": sparse, "dense_steps": dense,
                    "density_all_steps": dense + (1 - dense) * sparse,
                    # with the pooled tail
                    "operations_all_steps": operations, "fallbacks": one["fallbacks"],
                    "options": {k: v for k, v in method.to_dict().items()
                                if v is not None and not isinstance(v, dict)}}
        for what in ("psnr", "ssim", "features"):
            row[what] = mean_ci([clip[what] for clip in clips.values()])
            for other in (knobs.OURS, "random-blocks"):
                if other in found and other != name:
                    row[f"{what}_over_{other}"] = paired(clips, found[other], what)
        row["seconds_a_clip"] = record.spread([clip["seconds"] for clip in clips.values()])
        row["psnr_each"] = [round(clip["psnr"], 3) for clip in clips.values()]
        row["forward"] = timed.get(name)
        out.append(row)
    return out


def table(result: list[dict[str, Any]], stock: dict | None) -> Any:
    """The rows for a terminal."""
    from rich.table import Table

    heads = ["method", "density, sparse steps", "all steps", "PSNR dB", "over ours dB", "SSIM",
             "features", "ms a forward (p20 to p80)", "speed-up", "peak GiB"]
    made = Table(*heads, title="to stock; mean ± 95 % confidence", box=None)
    for row in result:
        time = row["forward"]
        over = row.get(f"psnr_over_{knobs.OURS}")
        made.add_row(
            row["variant"] + (" (control)" if row["control"] else ""),
            *(f"{row[k]:.3f}" if k in row else "" for k in
              ("density_sparse_steps", "density_all_steps")),
            _mean(row["psnr"], ".2f"), _mean(over, "+.2f"), _mean(row["ssim"], ".4f"),
            _mean(row["features"], ".4f"),
            "" if time is None else f"{time['seconds'] * 1e3:.1f} ({time['p20'] * 1e3:.1f} to "
            f"{time['p80'] * 1e3:.1f})",
            "" if time is None else f"{time['speedup']:.2f}x",
            "" if time is None or time["peak_memory_gib"] is None
            else f"{time['peak_memory_gib']:.2f}")
    if stock is not None:
        made.caption = f"stock: {stock['seconds'] * 1e3:.1f} ms a forward of the denoiser"
    return made


def _mean(value: dict | None, form: str) -> str:
    if value is None:
        return ""
    half = value["ci95"]
    return f"{value['mean']:{form}}" + (f" ± {half:{form.strip('+')}}" if half else "")


def run(args: argparse.Namespace, bar: Bar, tell: Callable[[Any], None]) -> Path:
    device = args.device
    found = models.find(args.model)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = models.load(found, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    best = found.defaults
    args.steps = args.steps or best.steps or 20
    guidance = best.guidance if args.guidance is None else args.guidance
    call: dict[str, Any] = {"num_inference_steps": args.steps, "height": args.size or best.height,
                            "width": args.size or best.width, **best.arguments}
    if guidance is not None:
        call["guidance_scale"] = guidance
    if "video" in best.kind:
        call["num_frames"] = args.frames or best.frames
    maker = Maker(pipe, call, device, found.shipped)
    rows = rows_of(args, maker, bar)
    times = forward_time.measure(maker, {"stock": None, **{
        name: method for name, method in rows.methods.items() if method is not None}},
        PROMPTS[0], args.repeats, bar)
    fewer = fewer_steps(args, times) if knobs.OURS in rows.methods else None
    if fewer is not None:
        rows.add(f"stock, {fewer[0]} steps", None, num_inference_steps=fewer[0])
    clips = quality(args, maker, rows, bar)
    result = summary(args, rows, clips, times)
    stock = next((row for row in times if row["variant"] == "stock"), None)
    settings = {"model": args.model, "density": args.density, "dense_steps": args.dense_steps,
                "call": call, "prompts": args.prompts, "seeds": args.seeds, "batch": args.batch,
                "repeats": args.repeats, "dtype": str(dtype), "features": FEATURES,
                "stock_forward": stock,
                "fewer_steps": None if fewer is None else
                {"steps": fewer[0], "share_of_stock_time": fewer[1],
                 "share_is": "given" if args.share else "measured here"}}
    suffix = "_tiny" if args.tiny else ""
    path = args.output or record.RESULTS / f"methods_{found.defaults and _slug(args.model)}_" \
        f"{device}_{args.density:g}{suffix}.json"
    record.write(path, "methods", device, settings, result)
    tell(table(result, stock))
    if fewer is None and knobs.OURS in rows.methods:
        tell("no row of fewer steps: our method is not faster than stock at this size on this "
             "device; --share 0.6 gives stock 60 % of its time")
    return path


def _slug(model: str) -> str:
    return Path(model).name.replace("-", "_")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="tiny-video")
    made.add_argument("--methods", nargs="*", help="default: every registered attention method")
    made.add_argument("--plan", nargs="*", type=Path, default=[], help="plans to add as rows")
    made.add_argument("--density", type=float, default=0.25)
    made.add_argument("--dense-steps", type=float, default=0.2, help="the same for every method")
    made.add_argument("--prompts", type=int, default=32)
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--steps", type=int)
    made.add_argument("--guidance", type=float)
    made.add_argument("--size", type=int)
    made.add_argument("--frames", type=int)
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--share", type=float, help="part of stock's time for the row of fewer steps")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--tiny", action="store_true", help="2 prompts, 1 seed, 3 steps, small clips")
    made.add_argument("--restart", action="store_true", help="forget an unfinished run")
    made.add_argument("--work", type=Path, help="folder of finished parts")
    made.add_argument("-o", "--output", type=Path)
    return made


def main(words: list[str] | None = None, bar: Bar | None = None,
         tell: Callable[[Any], None] | None = None) -> Path:
    import shutil

    from rich.console import Console

    args = parser().parse_args(words)
    if args.tiny:
        args.prompts, args.seeds, args.batch = min(args.prompts, 2), args.seeds[:1], 2
        args.steps, args.repeats = args.steps or 4, 2
        args.size, args.frames = args.size or 128, args.frames or 9
    # at this size whole tiles would leave nothing to choose from
    args.options = {"tile": (1, 4, 4)} if args.tiny else {}
    args.methods = knobs.names(args.methods)
    args.work = args.work or record.RESULTS.parent / ".work" / f"methods-{_slug(args.model)}" \
        f"-{args.device}{'-tiny' if args.tiny else ''}"
    if args.restart:
        shutil.rmtree(args.work, ignore_errors=True)
    path = run(args, bar or (lambda what, done, of: None), tell or Console(width=180).print)
    print(path)
    return path


if __name__ == "__main__":
    main()
