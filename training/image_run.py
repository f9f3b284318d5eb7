"""One piece of a resumable run of `tiny-image`: stages as far as its seconds reach, then export."""

import argparse
import json
import shutil
import time
import tomllib
import traceback
from pathlib import Path

import torch

from .image_sampling import evaluate_images
from .image_stages import ImageRun, train_codec, train_full, train_prompt_encoders, train_small
from .image_state import ImageState, export_image
from .probe import Probes
from .progress import Compiler, Log, fast_arithmetic
from .scenes import SceneSource
from .sheets import grid, stack


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="full state, same machine")
    parser.add_argument("--out", type=Path, required=True, help="folder, curves, restart parts")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--start", type=Path, help="pipeline folder, used if --state is empty")
    start.add_argument("--resume", type=Path, help="restart parts, used if --state is empty")
    clock = parser.add_mutually_exclusive_group(required=True)
    clock.add_argument("--seconds", type=float, help="wall clock of this piece")
    clock.add_argument("--until", type=float, help="its end, in seconds since 1970")
    parser.add_argument("--last", action="store_true", help="end the schedule with this piece")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def prepare(args: argparse.Namespace, log: Log) -> ImageRun:
    config = tomllib.loads(args.config.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_arithmetic(device)
    state = ImageState(config, device)
    resumed = "nothing"
    if (args.state / "state.pt").exists():
        state.load(args.state)
        resumed = "state"
    elif args.resume is not None:
        state.load_compact(args.resume)
        resumed = "parts"
    elif args.start is not None:
        state.load_folder(args.start)
        resumed = str(args.start.name)
    steps = int(sum(s["steps"] for s in state.record["stages"].values()))
    core = state.tokenizer.backend_tokenizer.to_str()
    source = SceneSource(config["scenes"], core, 500_000 + 7919 * (steps + 1), 1)
    log.write(
        "start",
        resumed=resumed,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        stages={k: round(v["spent"], 1) for k, v in state.record["stages"].items()},
        megabytes={
            k: sum(p.numel() for p in m.parameters()) * 2e-6 for k, m in state.modules().items()
        },
    )
    probes = Probes(args.config, log, device.type == "cuda" and not args.no_compile)
    run = ImageRun(state, log, Compiler(False), source, probes)
    run.save = lambda: save(run, args)
    return run


def save(run: ImageRun, args: argparse.Namespace) -> None:
    """The full state for this machine, and restart parts for any."""
    begin = time.monotonic()
    run.state.save(args.state)
    parts = run.state.save_compact(args.out / "restart")
    run.log.write("saved", parts=len(parts), seconds=time.monotonic() - begin)


def train(run: ImageRun, args: argparse.Namespace) -> None:
    """All stages in order; the full state is saved after each."""
    reserve = run.state.config["evaluation"]["reserve_seconds"]
    for name, stage in (
        ("text", train_prompt_encoders),
        ("codec", train_codec),
        ("small", train_small),
    ):
        if not run.state.stage(name)["done"]:
            stage(run, reserve)
            run.save()
    if not run.state.stage("full")["done"] and run.log.left() > reserve + 10:
        train_full(run, reserve, args.last)


def finish(run: ImageRun, args: argparse.Namespace) -> None:
    """Weights first; then the evaluation, which may not lose them."""
    state, log = run.state, run.log
    folder = args.out / "tiny-image"
    shutil.rmtree(folder, ignore_errors=True)
    report: dict = {"megabytes": export_image(state, folder)}
    log.write("export", **report["megabytes"])
    run.banks.clear()
    try:
        figures, shown = evaluate_images(folder, state, max(5.0, log.left() - 12))
        report |= figures
        sheets = [grid(frames, 8, 160, labels) for frames, labels in shown]
        sheets.append(grid(shown[0][0][:6], 3, state.config["edge"], shown[0][1][:6]))
        stack(sheets, args.out / "tiny-image.png")
    except Exception:
        report["error"] = traceback.format_exc()
    report["training"] = {"stages": state.record["stages"], "figures": state.record["figures"]}
    (args.out / "tiny-image.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)
    log.write("end", left=log.left())


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = args.seconds or args.until - time.time()
    log = Log(args.out / "tiny-image.jsonl", seconds)
    run = prepare(args, log)
    try:
        # a failed stage leaves what the last one saved: run the same command again
        train(run, args)
        finish(run, args)
    finally:
        run.probes.close()
        run.source.close()


if __name__ == "__main__":
    main()
