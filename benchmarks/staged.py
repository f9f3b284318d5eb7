"""Quality of staged sampling on a shipped model, against plain fewer steps of equal cost.

python benchmarks/staged.py --kind picture --device cuda            # each about a minute on an H200
python benchmarks/staged.py --kind clip --device cuda
python benchmarks/staged.py --model tiny-image --device cuda
python benchmarks/staged.py --tune 2 --device cuda                  # which stages win at 2x less
python benchmarks/staged.py --prompts 4 --seeds 1 --seconds 170     # a CPU; again until all is done

Pictures differ from stock's by design, so likeness to stock says nothing here. What is measured,
by a classifier: does the picture show what was asked for, and how likely does that look; how near
is the set to renders of the same captions (kernel distance on the classifier's features, unbiased
for small sets); sharpness. Every row has the same prompts and seeds.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from likeness import mean_ci  # noqa: E402
from staged_judge import Bench, Sample, kernel_distance, scales_of  # noqa: E402
from staged_rows import Row, grid, rows  # noqa: E402

FIGURES = ("object", "colour", "pattern", "place", "object_every_frame", "direction",
           "likelihood", "sharpness")
# seeds from here on have not chosen anything
FRESH = 1_000_000
Made = dict[str, list[Sample]]


class Store:
    """Finished samples of every row, in a folder, so that a run can go on where one ended."""

    def __init__(self, bench: Bench, folder: Path, batch: int, seconds: float) -> None:
        self.bench, self.folder, self.batch = bench, folder, batch
        self.deadline = time.perf_counter() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, row: Row, samples: range) -> list[Sample] | None:
        """A row's samples; None when the time is over."""
        found: list[Sample] = []
        for begin in range(samples.start, samples.stop, self.batch):
            part = range(begin, min(begin + self.batch, samples.stop))
            name = "".join(c if c.isalnum() else "_" for c in row.name)
            path = self.folder / f"{name}-{part.start}-{part.stop}.json"
            if not path.exists():
                if time.perf_counter() > self.deadline:
                    return None
                made = (self.bench.renders(part) if row.name == "renders"
                        else self.bench.samples(part, row))
                path.write_text(json.dumps(made))
                print(f"{part.start}+{len(part)} {row.name}", flush=True)
            found += json.loads(path.read_text())
        return found


def compare(store: Store, wanted: list[Row], samples: range) -> Made:
    """Samples of all rows, batch by batch; as many of each as the time allows for all."""
    made: Made = {row.name: [] for row in [Row("renders"), *wanted]}
    for begin in range(samples.start, samples.stop, store.batch):
        part = range(begin, min(begin + store.batch, samples.stop))
        found = {row.name: store.get(row, part) for row in [Row("renders"), *wanted]}
        if any(samples is None for samples in found.values()):
            break
        for name, part_made in found.items():
            made[name] += part_made or []
    return made


def score(samples: list[Sample], renders: list[Sample]) -> float:
    """What `--tune` ranks by: how likely what was asked looks, and how near the set is to renders.

    Mean log probability of what was asked, in nats, plus the share of right directions, minus the
    kernel distance.
    """
    likely = [sample["likelihood"] for sample in samples]
    moved = [sample["direction"] for sample in samples if "direction" in sample]
    right = sum(moved) / len(moved) if moved else 0.0
    return sum(likely) / len(likely) + right - _distance(samples, renders)


def tune(store: Store, candidates: list[Row]) -> list[tuple[float, Row]]:
    """The best rows of a grid, best first: a quarter goes on to the next round, on new seeds too.

    The scores are too good, because they chose the row; judge it on other samples.
    """
    seen: Made = {row.name: [] for row in [Row("renders"), *candidates]}
    left, begin, ranked = candidates, 0, [(-math.inf, row) for row in candidates]
    for batches in (1, 1, 2):
        part = range(begin, begin + batches * store.batch)
        renders = store.get(Row("renders"), part)
        if renders is None:
            break
        seen["renders"] += renders
        for row in left:
            seen[row.name] += store.get(row, part) or []
        complete = [row for row in left if len(seen[row.name]) == part.stop]
        if len(complete) < len(left) and begin:
            break  # the time is over; a round in which not all took part decides nothing
        ranked = sorted(((score(seen[row.name], seen["renders"]), row) for row in complete),
                        key=lambda found: -found[0])
        left, begin = [row for _, row in ranked[: max(2, len(ranked) // 4)]], part.stop
    return ranked


def summary(
    bench: Bench, wanted: list[Row], made: Made, costs: dict[float, float]
) -> list[dict[str, Any]]:
    real = torch.tensor([sample["features"] for sample in made["renders"]])
    found = [_figures("renders", made["renders"], None)]
    for row in wanted:
        samples, work = made[row.name], bench.work(row, costs)
        about = _figures(row.name, samples, _distance(samples, made["renders"]))
        about |= {"work": round(work, 4), "options": row.options, "steps": row.steps,
                  "seconds_a_sample": record.spread([sample["seconds"] for sample in samples])}
        fewer = _equal_cost(wanted, work * bench.steps)
        if row.options is not None and fewer is not None:
            gains = [a["likelihood"] - b["likelihood"]
                     for a, b in zip(samples, made[fewer.name], strict=True)]
            about["likelihood_over"] = {"run": fewer.name, **mean_ci(gains)}
        found.append(about)
    assert len(real) == found[0]["samples"]
    return found


def _figures(name: str, samples: list[Sample], distance: float | None) -> dict[str, Any]:
    about: dict[str, Any] = {"variant": name, "samples": len(samples), "work": None,
                             "kernel_distance": distance}
    for figure in FIGURES:
        values = [float(sample[figure]) for sample in samples if figure in sample]
        if values:
            about[figure] = mean_ci(values)
    return about


def _equal_cost(wanted: list[Row], steps: float) -> Row | None:
    """Fewer steps of about this work, never of more than a tenth less."""
    plain = [row for row in wanted if row.options is None and row.steps is not None]
    near = [row for row in plain if row.steps and row.steps >= 0.9 * steps]
    return min(near, key=lambda row: row.steps or 0, default=None)


def _distance(samples: list[Sample], renders: list[Sample]) -> float:
    one, two = (torch.tensor([sample["features"] for sample in made[: len(samples)]])
                for made in (samples, renders))
    return kernel_distance(one, two)


def show(found: list[dict[str, Any]]) -> None:
    for row in found:
        figures = " ".join(f"{name} {row[name]['mean']:.3f}" for name in FIGURES if name in row)
        distance, over = row["kernel_distance"], row.get("likelihood_over")
        gain = "" if over is None else (f" over {over['run']}: {over['mean']:+.3f} "
                                        f"± {over['ci95'] or math.nan:.3f}")
        print(f"{row['variant']:<44} work {row['work'] or math.nan:5.3f} "
              f"distance {math.nan if distance is None else distance:7.4f} {figures}{gain}")


def verdict(found: list[dict[str, Any]]) -> str:
    """Which stages beat fewer steps of equal cost, by more than chance."""
    over = {row["variant"]: row["likelihood_over"] for row in found if "likelihood_over" in row}
    better = [name for name, gain in over.items()
              if gain["ci95"] is not None and gain["mean"] > gain["ci95"]]
    return f"more likely than fewer steps of equal cost: {', '.join(better) or 'none'}"


def main() -> None:
    args = _arguments()
    folder = args.work or Path(tempfile.mkdtemp())
    start = time.perf_counter()
    bench = Bench(args.model, args.kind, args.device, args.prompts, judge=args.judge,
                  steps=args.steps, size=args.size, frames=args.frames)
    gpu = args.device == "cuda"
    batch = args.batch or ((32 if bench.clip else 128) if gpu else 2)
    store = Store(bench, folder, batch, args.seconds - (time.perf_counter() - start))
    costs = bench.costs({0.5, 0.75})
    budgets = args.budgets if args.tune is None else [args.tune]
    name = f"{Path(args.model).name}_{args.kind}_{args.device}.json"
    results = args.output / f"staged_tune_{name}"
    tuned = None
    if args.tune is not None:
        candidates = grid(bench.steps, costs, args.tune, args.candidates or (64 if gpu else 6))
        ranked = tune(store, candidates)
        best = ranked[0][1]
        print(f"tuned at {args.tune:g}x: {best.name} (of {len(candidates)}, {len(ranked)} left)")
        tuned = {"budget": args.tune, "steps": bench.steps, "options": best.options}
    elif results.exists():
        tuned = json.loads(results.read_text())["settings"]["tuned"]
        tuned = tuned if tuned["steps"] == bench.steps else None
    wanted = [row for row in rows(bench.steps, costs, budgets, tuned)
              if not args.only or row.name in args.only]
    costs = bench.costs(scales_of(wanted))
    first = 0 if args.tune is None else FRESH
    made = compare(store, wanted, range(first, first + args.prompts * args.seeds))
    if not made["renders"]:
        print(f"stopped before the first batch was whole; run again with --work {folder}")
        return
    found = summary(bench, wanted, made, costs)
    show(found)
    print(verdict(found))
    settings = {"model": Path(args.model).name, "kind": args.kind, "samples": len(made["renders"]),
                "prompts": args.prompts, "batch": batch, "steps": bench.steps, "call": bench.call,
                "judge": args.judge, "budgets": budgets, "tuned": tuned,
                "step_cost": {f"{scale:g}": cost for scale, cost in costs.items()}}
    path = results if args.tune is not None else args.output / f"staged_{name}"
    record.write(path, "staged", args.device, settings, found)
    print(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--kind", choices=("picture", "clip"), default="picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--judge", default="training.judge",
                        help="module with load_judge(device), a classifier of the model's world")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=8, help="of each prompt")
    parser.add_argument("--batch", type=int, help="samples a call; None: 128 pictures or 32 clips")
    parser.add_argument("--steps", type=int, help="of stock; None takes the model's own")
    parser.add_argument("--size", type=int, help="pixels; None takes the model's own")
    parser.add_argument("--frames", type=int, help="of a clip; None takes the model's own")
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.5, 2.0, 3.0],
                        help="times less work")
    parser.add_argument("--tune", type=float, metavar="BUDGET",
                        help="try a grid of stages at this budget, then judge the best one")
    parser.add_argument("--candidates", type=int, help="of the grid; None: 64, or 6 on a CPU")
    parser.add_argument("--only", nargs="*", default=[], help="rows to run, by their names")
    parser.add_argument("--seconds", type=float, default=math.inf,
                        help="stop then, and tell what is whole; run again for the rest")
    parser.add_argument("--work", type=Path, help="folder of finished samples, for going on")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
