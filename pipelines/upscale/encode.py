"""From frames to the clean latent of the second stage: resize in pixel space, encode, normalise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.pipelines.families.base import Size, Staging
from fastdiff.pipelines.upscale.families import Upscaling

# pixels of a frame above which a VAE works tile by tile: 720p
WHOLE = 1280 * 720
_FRAMES = 16


def resized(frames: Tensor, size: Size) -> Tensor:
    """Bilinear, each frame alone. frames: [B, F, 3, H, W] in any float dtype; returns float32."""
    if frames.shape[-2:] == (size.height, size.width):
        return frames.float()
    flat = frames.flatten(0, 1)
    parts = [F.interpolate(part.float(), (size.height, size.width), mode="bilinear")
             for part in flat.split(_FRAMES)]
    return torch.cat(parts).unflatten(0, frames.shape[:2])


@torch.no_grad()
def encoded(pipe: Any, upscaling: Upscaling, frames: Tensor, size: Size) -> Tensor:
    """Frames [B, F, 3, H, W] in 0..1 as the denoiser's clean latent, float32.

    The mean of what the encoder says, not a draw. [B, C, T, h, w], or [B, C, h, w] for pictures.
    """
    vae = pipe.vae
    device, still = pipe._execution_device, frames.shape[1] == 1 and vae_is_flat(vae)
    latents = []
    for clip in frames.split(1):
        pixels = resized(clip.to(device), size) * 2 - 1
        pixels = pixels[:, 0] if still else pixels.transpose(1, 2)
        found = vae.encode(pixels.to(vae.dtype))
        found = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        latents.append(upscaling.normalise(vae, found.float()))
    return torch.cat(latents)


def vae_is_flat(vae: Any) -> bool:
    """Whether a VAE takes single pictures [B, C, H, W]."""
    return type(vae).__name__ in ("AutoencoderKL", "AutoencoderTiny")


def as_held(
    model: Any, staging: Staging, upscaling: Upscaling, latents: Tensor, size: Size, like: Tensor
) -> Tensor:
    """Clean latents in the form in which the pipeline holds its own, `like`.

    CogVideoX 1.5 pads its frames at the front, so that they fill whole patches: the first is
    repeated there.
    """
    if upscaling.frames_first:
        latents = latents.transpose(1, 2)
    axis = 1 if upscaling.frames_first else 2
    if latents.ndim == like.ndim == 5 and like.shape[axis] > latents.shape[axis]:
        missing = like.shape[axis] - latents.shape[axis]
        first = latents.narrow(axis, 0, 1)
        latents = torch.cat([*[first] * missing, latents], axis)
    packed = staging.pack(model, latents, size)
    if packed.shape != like.shape:
        raise ValueError(f"the clip gives latents {tuple(packed.shape)}, but the pipeline holds "
                         f"{tuple(like.shape)}: the number of frames or of clips differs")
    return packed


@contextmanager
def vae_in_tiles(vae: Any, size: Size) -> Iterator[bool]:
    """Let the VAE work in tiles where frames are large; as it was before, afterwards."""
    before = getattr(vae, "use_tiling", None)
    wanted = before is False and size.height * size.width > WHOLE
    if wanted:
        vae.enable_tiling()
    try:
        yield wanted or bool(before)
    finally:
        if wanted:
            vae.disable_tiling()
