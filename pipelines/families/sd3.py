"""Stable Diffusion 3 and 3.5: latents [B, C, H, W], joint attention, text after the grid."""

from typing import Any

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, Staging, text_tokens


def read(model: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    p = model.config.patch_size
    return TokenLayout((1, height // p, width // p), after=text_tokens(arguments))


def trained(model: Any) -> int:
    """Half the side of the last training stage: others publish SD3 results there (RALU)."""
    return (model.config.sample_size * 8 // 2) ** 2


FAMILY = Family(
    name="SD3",
    denoisers=("SD3Transformer2DModel",),
    read=read,
    staging=Staging(
        pipelines=("StableDiffusion3Pipeline",),
        cell=lambda pipe: pipe.vae_scale_factor,
        unit=lambda model: model.config.patch_size,
        trained=trained,
        others="its loop uses a condition of the full size",
    ),
)
