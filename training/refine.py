"""Pieces after the first ones of `tiny-video`: from its pipeline folder to a better one."""

import argparse
import json
import shutil
import tomllib
import traceback
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .export import export
from .image_state import load_part
from .judge import load_judge
from .motion import train_motion
from .optim import Average
from .progress import Compiler, Log, fast_arithmetic
from .run import conclude, drive, judged, preview
from .scenes import SceneSource
from .sizes import train_sizes
from .stages import Run, quick_check, train_clips
from .state import State
from .text import wrap_tokenizer


def load_folder(state: State, folder: Path) -> None:
    """Weights of a pipeline folder; the average weights start the raw ones."""
    parts = (("text_encoder", state.text), ("vae", state.vae), ("transformer", state.denoiser))
    for name, module in parts:
        load_part(folder / name, module)
    state.tokenizer = wrap_tokenizer(Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json")))
    known = json.loads((folder / "vae" / "config.json").read_text())
    state.set_latent_statistics(known["latents_mean"], known["latents_std"])
    state.average = Average(state.denoiser, state.config["denoiser"]["average"])
    for name in ("text", "autoencoder", "classifier", "pictures"):
        state.stage(name)["done"] = True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="pipeline folder to start from")
    parser.add_argument("--state", type=Path, required=True, help="full state, same machine")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder, curves, report")
    parser.add_argument("--skip", nargs="*", default=[], help="stages that --start has had")
    parser.add_argument("--seconds", type=float, required=True, help="wall clock of this piece")
    parser.add_argument("--last", action="store_true", help="end the schedule with this piece")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def prepare(args: argparse.Namespace, log: Log) -> Run:
    config = tomllib.loads(args.config.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_arithmetic(device)
    state = State(config, device)
    state.classifier = load_judge(device)
    resumed = (args.state / "state.pt").exists()
    if resumed:
        state.load(args.state)
    else:
        load_folder(state, args.start)
        for name in args.skip:
            state.stage(name)["done"] = True
    for module in (state.text, state.vae, state.classifier):
        module.requires_grad_(False)
    run = Run(state, log, Compiler(device.type == "cuda" and not args.no_compile))
    steps = int(sum(s["steps"] for s in state.record["stages"].values()))
    core = state.tokenizer.backend_tokenizer.to_str()
    seed = 900_000 + 7919 * (steps + 1)
    run.source = SceneSource(config["scenes"], core, seed, config["clip_frames"])
    log.write("start", resumed=resumed, stages=state.record["stages"], torch=torch.__version__)
    return run


def train(run: Run, args: argparse.Namespace) -> None:
    settings = run.state.config["evaluation"]
    reserve = settings["reserve_seconds"] if args.last else settings["preview_seconds"]
    if not run.state.stage("motion")["done"]:
        train_motion(run, reserve)
        run.state.save(args.state)
    run.pools.clear()
    (train_sizes if "sizes" in run.state.config else train_clips)(run, reserve, args.last)
    run.state.save(args.state)


def finish(run: Run, args: argparse.Namespace) -> None:
    """Weights first; then samples and evaluation, none of which may lose them."""
    state, log = run.state, run.log
    folder = args.out / "tiny-video"
    shutil.rmtree(folder, ignore_errors=True)
    report: dict = {"megabytes": export(state, folder)}
    log.write("export", **report["megabytes"])
    run.banks.clear()
    images = []
    try:
        if not args.last:
            quick_check(run, "clips")
        images += preview(run)
        if args.last:
            images += judged(run, folder, report)
    except Exception:
        report["error"] = traceback.format_exc()
    conclude(run, report, images, args.out / "tiny-video.json", args.out / "tiny-video.png")


if __name__ == "__main__":
    drive(arguments(), "tiny-video.jsonl", prepare, train, finish)
