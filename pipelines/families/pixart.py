"""PixArt (alpha, Sigma) and DiT: latents [B, C, H, W], no text in the grid."""

from typing import Any

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, Staging


def read(model: Any, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    p = model.config.patch_size
    return TokenLayout((1, height // p, width // p))


def trained(model: Any) -> int:
    """Each checkpoint was tuned from the one of half its size."""
    return (model.config.sample_size * 8 // 2) ** 2


FAMILY = Family(
    name="PixArt",
    denoisers=("PixArtTransformer2DModel", "DiTTransformer2DModel"),
    read=read,
    staging=Staging(
        pipelines=("PixArtSigmaPipeline",),
        cell=lambda pipe: pipe.vae_scale_factor,
        unit=lambda model: model.config.patch_size,
        trained=trained,
    ),
)
