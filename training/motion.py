"""The Wan autoencoder made to follow motion: full clips, with weight where the object passes."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import reconstruction_loss
from .data import Batch, render
from .descent import Descent
from .progress import autocast
from .stages import Run, measure_latents, run_stage

REACH = 4
"""Frames before and after in which a pixel counts as passed by the object: one latent frame."""


def passed_by(scenes: Batch, sprites: Tensor, edge: int) -> Tensor:
    """[B, T, 1, edge, edge] in [0, 1]: where the object is within `REACH` frames of each frame."""
    alpha = render(scenes, sprites, edge, alpha_only=True)
    b, t = alpha.shape[:2]
    flat = alpha.view(b, 1, t, edge * edge)
    wide = F.max_pool2d(flat, (2 * REACH + 1, 1), stride=1, padding=(REACH, 0))
    return wide.view(b, t, 1, edge, edge)


def motion_loss(frames: Tensor, target: Tensor, passed: Tensor, weight: float) -> Tensor:
    """The reconstruction loss, with more weight on L1 and edges where the object passes."""
    error = (frames.float() - target.float()).abs()
    loss = reconstruction_loss(frames, target) + weight * (error * passed).mean()
    for dim in (-1, -2):
        rough = frames.float().diff(dim=dim) - target.float().diff(dim=dim)
        mask = passed.narrow(dim, 0, passed.shape[dim] - 1)
        loss = loss + 0.5 * weight * (rough.abs() * mask).mean()
    return loss


def train_motion(run: Run, reserve: float) -> None:
    """Encoder and decoder on clips of full length and on pictures, from where they stand.

    The latent statistics stay, so that the denoiser goes on from nearly the same latents.
    """
    state, config, edge = run.state, run.state.config["motion"], run.state.config["edge"]
    descent = Descent.of_codec(state.vae.requires_grad_(True).parameters(), config["lr"], 50)
    _, std = state.latent_statistics()
    std = std.view(1, 1, 16, 1, 1)
    rng = random.Random(21)

    def step(progress: float) -> dict[str, Tensor]:
        kind = "pictures" if rng.random() < config["picture_share"] else "clips"
        scenes = run.draw(kind, config[f"{kind}_batch"])
        video = render(scenes, run.sprites, edge)
        passed = passed_by(scenes, run.sprites, edge)
        with autocast(run.state.device):
            mean, log_variance = run.codec.encode(video).float().chunk(2, 2)
            log_variance = log_variance.clamp(-20, 4)
            noise = torch.exp(0.5 * log_variance) + config["noise"] * std * torch.rand_like(
                mean[:, :1, :1, :1, :1]
            )
            back = run.codec.decode(mean + noise * torch.randn_like(mean))
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            loss = motion_loss(back, video, passed, config["weight"]) + config["kl"] * kl
        descent.step(loss, progress)
        error = F.mse_loss(back.detach().float().clamp(-1, 1), video)
        return {f"{kind}_loss": loss.detach(), f"{kind}_psnr": -10 * torch.log10(error / 4)}

    run_stage(run, "motion", step, config["seconds"], reserve)
    state.vae.requires_grad_(False)
    measure_latents(run, keep=True)
