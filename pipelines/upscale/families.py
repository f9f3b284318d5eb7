"""What the second stage must know of a family: how its VAE's latents are written, its text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (vae, latents of vae.encode) -> latents as the denoiser was trained on them
Normalise = Callable[[Any, Tensor], Tensor]


def by_channel(vae: Any, latents: Tensor) -> Tensor:
    """Wan: the mean and standard deviation of each channel stand in the config."""
    mean, std = (torch.tensor(x, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
                 for x in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std


def by_buffer(vae: Any, latents: Tensor) -> Tensor:
    """LTX: the same as buffers, and one factor."""
    mean, std = (x.to(latents).view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
    return (latents - mean) * vae.config.scaling_factor / std


def by_factor(vae: Any, latents: Tensor) -> Tensor:
    """One factor, after a shift where there is one."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


@dataclass(frozen=True)
class Upscaling:
    """A family that can be upscaled.

    pipelines: class names whose call was examined. normalise: see Normalise. cross: text comes by
    cross-attention; else text and grid share one attention. shift: of the second stage's flow
    schedule, None for what schedule.py finds. frames_first: latents are [B, T, C, H, W].
    as_trained: arguments of the call that say a size in pixels and stay the trained one.
    """

    pipelines: tuple[str, ...]
    normalise: Normalise
    cross: bool
    shift: float | None = None
    frames_first: bool = False
    as_trained: tuple[str, ...] = ()


# by the name of the family's record
UPSCALING = {
    # the shift is the paper's, for Wan 2.1
    "Wan": Upscaling(("WanPipeline", "WanImageToVideoPipeline"), by_channel, True, 9.0),
    "LTX": Upscaling(("LTXPipeline",), by_buffer, True),
    "CogVideoX": Upscaling(("CogVideoXPipeline",), by_factor, False, frames_first=True),
    "HunyuanVideo": Upscaling(("HunyuanVideoPipeline",), by_factor, False),
    "Flux": Upscaling(("FluxPipeline",), by_factor, False),
    "Stable Diffusion UNet (1.5, 2, XL)": Upscaling(
        ("StableDiffusionXLPipeline", "StableDiffusionPipeline"), by_factor, True,
        as_trained=("original_size", "target_size")),
}


def upscaling_of(pipe: Any, family: Any) -> Upscaling:
    """The record for this pipeline; a ValueError says what is accepted."""
    found = UPSCALING.get(family.name)
    names = {cls.__name__ for cls in type(pipe).__mro__}
    if found is None or not names & {*found.pipelines}:
        known = ", ".join(name for record in UPSCALING.values() for name in record.pipelines)
        raise ValueError(f"freeswim does not know how {type(pipe).__name__} ({family.name}) takes "
                         f"a clip to begin with. Accepted: {known}")
    return found
