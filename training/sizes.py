"""Clips of several sizes: what makes larger ones usable."""

import math
import random

import torch

from .autoencoder import FullSequence
from .bank import Bank
from .data import load_sprites, make_batch, random_scene, render
from .denoiser import flow_loss
from .progress import autocast
from .stages import Run, run_stage

SPRITE_PIXELS = 448


def shift_of(shift: float, edge: int, base: int) -> float:
    """The shift at `edge` that leaves its coarse structure as noisy as `shift` does at `base`."""
    return shift * edge / base


def train_sizes(run: Run, reserve: float, last: bool) -> None:
    """Clips and pictures of the own size with shares of larger clips; the stage counts as clips."""
    state = run.state
    clips, pictures, sizes = (state.config[name] for name in ("clips", "pictures", "sizes"))
    stage, base = state.stage("clips"), state.config["edge"]
    banks = {kind: run.bank(kind) for kind in ("clips", "pictures")}
    sprites = load_sprites(state.device, SPRITE_PIXELS)
    plain = FullSequence(state.vae)
    for edge, batch in zip(sizes["edges"], sizes["encode_batches"], strict=True):
        bank = Bank("clips", state, run.source, plain, sprites, edge, sizes["bank"], batch)
        bank.fill(sizes["fill_seconds"])
        banks[edge] = bank
        run.log.write("bank", edge=edge, rows=bank.filled, psnr=codec_psnr(run, edge))
    seconds = stage["spent"] + max(run.log.left() - reserve, 0.1) if last else clips["seconds"]
    rng, count = random.Random(8), 0
    batches = dict(zip(sizes["edges"], sizes["batches"], strict=True))

    def step(progress: float) -> dict[str, torch.Tensor]:
        nonlocal count
        tail = max(0.0, (progress - clips["decay_from"]) / (1 - clips["decay_from"]))
        scale = min(1.0, (count + 1) / 30) * (1 - 0.97 * tail)
        draw, shift = rng.random(), clips["shift"]
        if draw < sizes["share"]:
            name = rng.choice(sizes["edges"])
            shift = shift_of(shift, name, base)
            renew = rng.random() < 1 / sizes["refresh_every"]
        else:
            name = "pictures" if rng.random() < clips["picture_share"] else "clips"
            renew = count % clips["refresh_every"] == 0
            shift = shift if name == "clips" else pictures["shift"]
        if renew:
            banks[name].renew()
        count += 1
        batch = batches.get(name) or {"clips": clips, "pictures": pictures}[name]["batch"]
        loss = flow_loss(
            run.lean, *banks[name].sample(batch), shift, run.dtype, clips.get("tail", 0.0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.denoiser.parameters(), 1.0)
        state.optimizer.step(scale)
        state.average.update()
        return {f"loss_{name}": loss.detach()}

    run_stage(run, "clips", step, seconds, reserve)


@torch.no_grad()
def codec_psnr(run: Run, edge: int) -> float:
    """dB of the autoencoder on one full clip of `edge` pixels."""
    rng, plain = random.Random(3), FullSequence(run.state.vae)
    frames = run.state.config["clip_frames"]
    scenes = make_batch([random_scene(rng, True)], rng, frames, frames).to(run.state.device)
    with autocast(run.state.device):
        video = render(scenes, load_sprites(run.state.device, SPRITE_PIXELS), edge)
        back = plain.decode(plain.encode(video)[:, :, :16]).float().clamp(-1, 1)
    return -10 * math.log10((back - video).square().mean().item() / 4)
