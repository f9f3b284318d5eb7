"""One piece of a resumable run of `tiny-unet`: text encoder, UNet at two sizes, then export.

python -m training.unet_run --config training/tiny_unet.toml --start tiny-image --state S --out O \\
    --seconds 540
"""

import argparse
import json
import random
import shutil
import tomllib
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor

from .captions import caption, plain_caption
from .data import load_sprites, random_scene
from .descent import Descent
from .evaluator import Evaluator
from .image_bank import ImageBank
from .image_models import encode_prompts
from .lean_codec import LeanCodec
from .progress import Compiler, Log, autocast, fast_arithmetic
from .sampling import held_out_scenes
from .scenes import SceneSource
from .sheets import grid, stack
from .stages import run_stage
from .text import TextHeads, caption_labels, text_loss, tokenize
from .unet_models import UNetState, export_unet, noised


class UNetRun:
    """What a stage needs besides the state."""

    def __init__(self, state: UNetState, log: Log, seed: int):
        self.state, self.log = state, log
        self.compiler = Compiler(False)
        core = state.tokenizer.backend_tokenizer.to_str()
        self.source = SceneSource(state.config["scenes"], core, seed, 1)
        self.sprites = load_sprites(state.device, state.config["sprites"])

    def bank(self, config: dict) -> ImageBank:
        codec = LeanCodec(self.state.vae)
        bank = ImageBank(config["edge"], config, self.state, self.source, codec, self.sprites)
        self.log.write("bank", edge=bank.edge, **bank.fill(config["fill_seconds"]))
        return bank


def train_clip(run: UNetRun, reserve: float) -> None:
    """Teach the text encoder to say what captions mean; then freeze it."""
    state, config, device = run.state, run.state.config["text"], run.state.device
    rng = random.Random(11)
    scenes = [random_scene(rng, False) for _ in range(config["captions"])]
    ids, mask = tokenize(state.tokenizer, [caption(s, rng) for s in scenes], device)
    labels = {k: v.to(device) for k, v in caption_labels(scenes).items()}
    heads = TextHeads(config["dim"]).to(device)
    params = [*state.text.requires_grad_(True).parameters(), *heads.parameters()]
    descent = Descent(params, config["lr"])

    def step(progress: float) -> dict[str, Tensor]:
        index = torch.randint(len(ids), (config["batch"],), device=device)
        hidden = encode_prompts(state.text, state.text, ids[index])[0]
        logits = heads(hidden, mask[index])
        said = {k: v[index] for k, v in labels.items()}
        loss = text_loss(logits, said)
        descent.step(loss, progress)
        right = (logits["object"].argmax(1) == said["object"]).float().mean()
        return {"loss": loss.detach(), "object": right}

    run_stage(run, "text", step, config["seconds"], reserve)
    state.text.eval().requires_grad_(False)


def train_unet(run: UNetRun, name: str, reserve: float, last: bool) -> None:
    """The UNet on pictures of one size, by the velocity of the noise schedule."""
    state, config = run.state, run.state.config[name]
    state.text.eval().requires_grad_(False)
    bank, count, stage = run.bank(config), 0, state.stage(name)
    fresh = stage["steps"] == 0
    decay_from = config.get("decay_from", 1.0)
    goal = stage["spent"] + max(run.log.left() - reserve, 0.1) if last else config["seconds"]

    def step(progress: float) -> dict[str, Tensor]:
        nonlocal count
        if count % config["refresh_every"] == config["refresh_every"] - 1:
            bank.renew()
        scale = min(1.0, (count + 1) / (200 if fresh else 50))
        scale *= 1 - 0.97 * max(0.0, (progress - decay_from) / max(1 - decay_from, 1e-6))
        count += 1
        latents, hidden, _ = bank.sample(config["batch"])
        t = torch.randint(1000, (len(latents),), device=state.device)
        here, wanted = noised(state.alphas, latents.float(), t)
        with autocast(run.state.device):
            found = state.denoiser(here, t, hidden, return_dict=False)[0]
        loss = F.mse_loss(found.float(), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.denoiser.parameters(), 1.0)
        state.optimizer.step(scale)
        state.average.update()
        return {"loss": loss.detach()}

    run_stage(run, name, step, goal, reserve)


def evaluate(folder: Path, state: UNetState, out: Path) -> dict:
    """Figures of the genuine pipeline's pictures of held-out scenes, and a sheet of them."""
    settings, edge = state.config["evaluation"], state.config["edge"]
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe = pipe.to(state.device)
    pipe.set_progress_bar_config(disable=True)
    scenes, frames = held_out_scenes(settings["pictures"], clip=False), []
    prompts = [plain_caption(scene) for scene in scenes]
    for begin in range(0, len(prompts), settings["picture_batch"]):
        part = prompts[begin : begin + settings["picture_batch"]]
        found = pipe(
            part, height=edge, width=edge, num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"], guidance_rescale=0.7, output_type="pt",
            generator=torch.Generator(state.device).manual_seed(begin),
        )
        frames.append(found.images.float().clamp(0, 1).cpu())
    pictures = torch.cat(frames)
    labels = prompts[:32]
    stack([grid(pictures[:32] * 2 - 1, 8, 160, labels)], out / "tiny-unet.png")
    return Evaluator(state.device).pictures(pictures, scenes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="pipeline folder whose autoencoder is used")
    parser.add_argument("--state", type=Path, required=True, help="full state, same machine")
    parser.add_argument("--out", type=Path, required=True, help="folder, curve, restart parts")
    parser.add_argument("--resume", type=Path, help="restart parts, used if --state is empty")
    parser.add_argument("--seconds", type=float, required=True, help="wall clock of this piece")
    parser.add_argument("--last", action="store_true", help="end the schedule with this piece")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "tiny-unet.jsonl", args.seconds)
    config = tomllib.loads(args.config.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_arithmetic(device)
    state = UNetState(config, device)
    if (args.state / "state.pt").exists():
        state.load(args.state)
    elif args.resume is not None:
        state.load_compact(args.resume)
    elif args.start is not None:
        state.load_codec(args.start)
    else:
        log.write("start", note="no --start: the autoencoder is random, the run learns nothing")
    steps = int(sum(stage["steps"] for stage in state.record["stages"].values()))
    run = UNetRun(state, log, 700_000 + 7919 * (steps + 1))
    reserve = config["evaluation"]["reserve_seconds"]
    try:
        if not state.stage("text")["done"]:
            train_clip(run, reserve)
            state.save(args.state)
        for name in ("small", "full"):
            if not state.stage(name)["done"] and log.left() > reserve + 1:
                train_unet(run, name, reserve, args.last and name == "full")
                state.save(args.state)
                state.save_compact(args.out / "restart")
    finally:
        run.source.close()
    folder = args.out / "tiny-unet"
    shutil.rmtree(folder, ignore_errors=True)
    report: dict = {"megabytes": export_unet(state, folder), "stages": state.record["stages"]}
    try:
        report["figures"] = evaluate(folder, state, args.out)
    except Exception:
        report["error"] = traceback.format_exc()
    (args.out / "tiny-unet.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
