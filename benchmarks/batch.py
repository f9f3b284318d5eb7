"""What batches and several workers gain on the shipped model, and that every job is made once.

python benchmarks/batch.py                        # jobs at a time on one device, and the overlap
python benchmarks/batch.py --gpus 2               # 1 and 2 workers, each on its own GPU
python benchmarks/batch.py --processes 2 --tiny   # the same on a CPU, small
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
import record  # noqa: E402

from fastdiff.batch import api  # noqa: E402
from fastdiff.batch.folder import Folder  # noqa: E402
from fastdiff.batch.launch import gpus  # noqa: E402
from fastdiff.batch.maker import PipelineMaker  # noqa: E402
from fastdiff.batch.task import Task  # noqa: E402

PROMPTS = ("a red apple moving left on a blue background", "a sailboat on a cyan background",
           "a rocket moving up on a black background", "a sun moving up on a blue background")


def plan(jobs: int, args: argparse.Namespace, first: int = 0) -> list[Task]:
    fields: dict[str, Any] = {"model": "tiny-video", "method": args.method, "kind": args.kind}
    if args.steps:
        fields["steps"] = args.steps
    if args.tiny:
        fields |= {"size": "64", "frames": 5 if args.kind == "video" else 1, "steps": 2}
    return api.plan([{**fields, "prompt": PROMPTS[i % len(PROMPTS)], "seed": first + i}
                     for i in range(jobs)])


def together(args: argparse.Namespace, home: Path) -> list[dict[str, Any]]:
    """Seconds a job when so many run in one call, interleaved; and the largest difference."""
    maker = PipelineMaker()
    sizes = [size for size in (1, 2, 4, 8) if size <= args.most]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    frames: dict[int, list[np.ndarray]] = {}
    tasks = plan(max(sizes), args)
    for repeat in range(args.repeats + 1):
        for size in sizes:
            made = []
            for begin in range(0, len(tasks), size):
                made += maker.make(tasks[begin: begin + size], lambda step, of: None)
            if repeat:
                # the first time is for compiling and caches
                seconds[size].append(statistics.mean(one.content.seconds for one in made))
            frames[size] = [one.content.frames for one in made]
    rows = []
    for size in sizes:
        found = record.spread(seconds[size])
        away = max(float(np.abs(one - other).max())
                   for one, other in zip(frames[1], frames[size], strict=True))
        rows.append({"what": "seconds a job", "together": size, **found,
                     "gain": statistics.median(seconds[1]) / found["seconds"],
                     "largest_difference": away})
        print(f"{size} together: {found['seconds']:.3f} s a job, {rows[-1]['gain']:.2f}x, "
              f"largest difference {away:.2g}")
    return [*rows, overlap(args, home, maker)]


def overlap(args: argparse.Namespace, home: Path, maker: PipelineMaker) -> dict[str, Any]:
    """Wall time of a whole run, against the sum of what it did."""
    writing: list[float] = []

    class Timed(PipelineMaker):
        def write(self, made: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
            begin = time.perf_counter()
            found = super().write(made, folder)
            writing.append(time.perf_counter() - begin)
            return found

    timed = Timed(_pipe=maker._pipe, _loaded=maker._loaded)
    tasks = plan(args.jobs, args, first=1000)
    outcome = api.run_tasks(tasks, Folder(home / "overlap"), api.Options(batch_size=1),
                            api.Hooks(maker=timed))
    made = [json.loads(Path(f"{path}.json").read_text()) for path in outcome.results]
    denoising = sum(one["seconds"] for one in made)
    row = {"what": "overlap", "jobs": len(tasks), "wall": outcome.seconds, "denoising": denoising,
           "writing": sum(writing), "gain": (denoising + sum(writing)) / outcome.seconds}
    print(f"overlap: {denoising:.1f} s denoising and {row['writing']:.1f} s writing took "
          f"{outcome.seconds:.1f} s in all")
    return row


def shared(args: argparse.Namespace, home: Path, count: int) -> list[dict[str, Any]]:
    """1 and `count` workers on as many jobs each, then `count` with one killed in the middle."""
    rows = []
    for workers, kill in ((1, False), (count, False), (count, True)):
        tasks = plan(args.jobs * workers, args)
        folder = Folder(home / f"{workers}-{kill}")
        seen: dict[str, tuple[int, int]] = {}

        def on_event(event: dict[str, Any], seen: dict = seen) -> None:
            if event["event"] == "done":
                found = Path(f"{event['file']}.json").stat()
                seen[event["id"]] = (found.st_ino, found.st_mtime_ns)

        killer = threading.Thread(target=_kill_one, args=(folder, len(tasks) // 3), daemon=True)
        if kill:
            killer.start()
        begin = time.perf_counter()
        # a single worker is started like several, so that only their number differs
        options = api.Options(processes=workers, batch_size=args.batch_size, launched=True)
        outcome = api.run_tasks(tasks, folder, options, api.Hooks(on_event))
        wall = time.perf_counter() - begin
        if kill:
            killer.join(timeout=1)
            assert not killer.is_alive(), "no worker could be killed: more --jobs"
        sidecars = [Path(f"{path}.json") for path in outcome.results if path is not None]
        assert outcome.ok and len({*sidecars}) == len(tasks) == len(seen), "a job is missing"
        # a second write would be another file
        again = [path.name for path in sidecars if (path.stat().st_ino, path.stat().st_mtime_ns)
                 not in seen.values()]
        assert not again, f"made twice: {again}"
        places = Counter(json.loads(path.read_text())["batch"]["worker"] for path in sidecars)
        times = sorted(path.stat().st_mtime for path in sidecars)
        # from the first result on: loading is the same for any number of jobs
        rate = (len(times) - 1) / (times[-1] - times[0])
        rows.append({"what": "workers", "workers": workers, "killed": int(kill),
                     "jobs": len(tasks), "wall": wall, "jobs_per_second": rate,
                     "by_worker": sorted(places.values()), "once": True})
        print(f"{workers} workers{', one killed' if kill else ''}: {rate:.2f} jobs a second, "
              f"{wall:.1f} s with loading; by worker {rows[-1]['by_worker']}; each job once")
    rows[1]["scaling"] = rows[1]["jobs_per_second"] / rows[0]["jobs_per_second"]
    print(f"{count} workers: {rows[1]['scaling']:.2f}x one")
    return rows


def _kill_one(folder: Folder, after: int) -> None:
    """kill -9 of a worker that holds a job, once so many are made."""
    while True:
        try:
            if len(folder.listing()[0]) >= after:
                for claim in (folder.home / "claims").glob("[0-9a-f]*.1"):
                    os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
                    return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", help="workers, each on its own GPU")
    parser.add_argument("--processes", type=int, help="workers on whatever there is")
    parser.add_argument("--jobs", type=int, default=16, help="of one worker")
    parser.add_argument("--kind", default="video", choices=("video", "image"))
    parser.add_argument("--method", default="stock")
    parser.add_argument("--steps", type=int, help="default: those of the model")
    parser.add_argument("--most", type=int, default=8, help="jobs of a call")
    parser.add_argument("--batch-size", type=int, default=1, help="of the workers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small and few steps")
    parser.add_argument("--out", type=Path, help="the result file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = gpus(args.gpus) if args.gpus else args.processes
    with tempfile.TemporaryDirectory() as home:
        rows = (together(args, Path(home)) if count is None
                else shared(args, Path(home), count))
    name = "batch" if count is None else "batch-workers"
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    made = plan(1, args)[0].settings
    settings |= {name: getattr(made, name) for name in (
        "model", "height", "width", "frames", "steps", "dtype")}
    record.write(args.out or record.RESULTS / f"{name}-{device}.json", name, device, settings, rows)


if __name__ == "__main__":
    main()
