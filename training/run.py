"""One piece of a resumable training run: every stage as far as its seconds reach, then export."""

import argparse
import json
import shutil
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from .autoencoder import FullSequence
from .captions import plain_caption
from .data import render
from .evaluate import evaluate
from .export import export
from .progress import Compiler, Log, autocast
from .sampling import held_out_scenes, sample
from .scenes import SceneSource
from .sheets import grid, stack, strips
from .stages import (
    Run,
    quick_check,
    train_autoencoder,
    train_classifier,
    train_clips,
    train_decoder,
    train_pictures,
    train_text,
)
from .state import State


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="full state, same machine")
    parser.add_argument("--out", type=Path, required=True, help="restart parts, log, sheet, report")
    parser.add_argument("--resume", type=Path, help="restart parts, used if --state is empty")
    parser.add_argument("--seconds", type=float, required=True, help="wall clock of this piece")
    parser.add_argument("--last", action="store_true", help="end the schedule, then evaluate")
    parser.add_argument("--redo", nargs="*", default=[], help="stages to run once more")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def prepare(args: argparse.Namespace, log: Log) -> Run:
    config = tomllib.loads(args.config.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 4
    state = State(config, device)
    if (args.state / "state.pt").exists():
        state.load(args.state)
        log.write("start", resumed="state", **_spent(state))
    elif args.resume is not None:
        state.load_compact(args.resume)
        log.write("start", resumed="parts", **_spent(state))
    for name in args.redo:
        state.record["stages"].pop(name, None)
    compiler = Compiler(device.type == "cuda" and not args.no_compile)
    run = Run(state, log, compiler)
    spent = int(sum(s["steps"] for s in state.record["stages"].values()))
    core = state.tokenizer.backend_tokenizer.to_str()
    run.source = SceneSource(
        config["scenes"], core, 1000 + 7919 * (spent + 1), config["clip_frames"]
    )
    estimate(state, log)
    return run


def _spent(state: State) -> dict[str, float]:
    return {k: round(v["spent"], 1) for k, v in state.record["stages"].items()}


def estimate(state: State, log: Log) -> None:
    """Print parameter counts and the memory of the banks before anything runs."""
    config = state.config
    edge, frames = config["edge"] // 8, (config["clip_frames"] + 3) // 4
    values = 16 * edge * edge * 2
    text = 32 * config["text"]["dim"] * 2
    log.write(
        "start",
        device=torch.cuda.get_device_name() if state.device.type == "cuda" else "cpu",
        torch=torch.__version__,
        megabytes={
            k: sum(p.numel() for p in m.parameters()) * 2e-6 for k, m in state.modules().items()
        },
        picture_bank_gb=config["pictures"]["bank"] * (values + text) / 1e9,
        clip_bank_gb=config["clips"]["bank"] * (values * frames + text) / 1e9,
    )


def train(run: Run, args: argparse.Namespace) -> None:
    """All stages in order; the full state is saved after each."""
    settings = run.state.config["evaluation"]
    reserve = settings["reserve_seconds"] if args.last else settings["preview_seconds"]
    for name, stage in (
        ("text", train_text),
        ("autoencoder", train_autoencoder),
        ("classifier", train_classifier),
    ):
        if not run.state.stage(name)["done"]:
            stage(run, reserve)
            run.state.save(args.state)
    run.pools.clear()
    if not run.state.stage("pictures")["done"]:
        limit = None
        if args.last:
            clips = run.state.config["clips"]
            limit = max(0.0, run.log.left() - reserve - clips["seconds"] - clips["fill_seconds"])
        train_pictures(run, reserve, limit)
        run.state.save(args.state)
    if run.state.stage("pictures")["done"] and not run.state.stage("clips")["done"]:
        after = run.state.config["decoder"]["seconds"] + 5 if args.last else 0
        train_clips(run, reserve + after, args.last)
        run.state.save(args.state)
    if run.state.stage("clips")["done"] and not run.state.stage("decoder")["done"]:
        train_decoder(run, reserve)
        run.state.save(args.state)


def preview(run: Run) -> list[Image.Image]:
    """Reconstructions over their originals, samples of pictures, and clips if those have begun."""
    config, state = run.state.config, run.state
    model, images = FullSequence(state.vae), []
    clip = run.source.next("clips", state.device)[0][:2]
    with torch.no_grad(), autocast(run.state.device):
        video = render(clip, run.sprites, config["edge"])
        back = model.decode(model.encode(video)[:, :, :16]).float().clamp(-1, 1)
    for pair in zip(video, back, strict=True):
        images.append(strips(torch.stack(pair), 5, config["edge"], ["original", "autoencoder"]))
    kinds = [("pictures", 24)] + ([("clips", 6)] if state.stage("clips")["steps"] else [])
    for kind, n in kinds:
        pictures = state.stage("pictures")
        if pictures["steps"] == 0 and not pictures["done"]:
            break
        frames = config["clip_frames"] if kind == "clips" else 1
        scenes = held_out_scenes(n, kind == "clips")
        settings = config["evaluation"]
        video = sample(state, scenes, frames, settings["steps"], settings["guidance"], n)
        words = [plain_caption(s) for s in scenes]
        images.append(
            strips(video, 8, 128, words) if frames > 1 else grid(video[:, 0], 8, 128, words)
        )
    return images


def finish(run: Run, args: argparse.Namespace) -> None:
    """Weights first; then samples, export and evaluation, none of which may lose them."""
    state, log = run.state, run.log
    parts = state.save_compact(args.out)
    log.write("saved", parts=len(parts), megabytes=sum(p.stat().st_size for p in parts) / 1e6)
    report, images = {}, []
    folder = args.state / "pipeline"
    try:
        images += preview(run)
        if args.last:
            shutil.rmtree(folder, ignore_errors=True)
            report["megabytes"] = export(state, folder)
            log.write("export", **report["megabytes"])
            images += judged(run, folder, report)
        elif log.left() > 4 and state.stage("pictures")["steps"]:
            quick_check(run, "pictures")
    except Exception:
        report["error"] = traceback.format_exc()
        print(report["error"], flush=True)
    conclude(run, report, images, args.out / "report.json", args.out / "sheet.png")


def judged(run: Run, folder: Path, report: dict) -> list[Image.Image]:
    """Put the figures of the exported pipeline into the report; its sheets."""
    state, seconds = run.state, max(10.0, run.log.left() - 8)
    figures, sheets = evaluate(folder, state.classifier, state.config, state.device, seconds)
    report |= figures
    return sheets


def conclude(
    run: Run, report: dict, images: list[Image.Image], text: Path, sheet: Path
) -> None:
    """Write report and sheet, the last that a piece does."""
    record = run.state.record
    report["training"] = {"stages": record["stages"], "figures": record["figures"]}
    text.write_text(json.dumps(report, indent=2) + "\n")
    if images:
        stack(images, sheet)
    print(json.dumps(report, indent=2), flush=True)
    run.log.write("end", left=run.log.left())


Piece = Callable[[Run, argparse.Namespace], None]


def drive(
    args: argparse.Namespace, curves: str, prepare: Callable[[argparse.Namespace, Log], Run],
    train: Piece, finish: Piece,
) -> None:
    """One piece from its arguments to its report; what failed in training is saved and told."""
    args.out.mkdir(parents=True, exist_ok=True)
    run = prepare(args, Log(args.out / curves, args.seconds))
    try:
        try:
            train(run, args)
        except Exception:
            traceback.print_exc()
            run.state.save(args.state)
        finish(run, args)
    finally:
        run.source.close()


if __name__ == "__main__":
    drive(arguments(), "curves.jsonl", prepare, train, finish)
