"""UNets of Stable Diffusion 1.5, 2 and XL: every Transformer2DModel has its own grid."""

from typing import Any

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, Staging


def read(block: nn.Module, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout((1, height, width))


def unit(model: Any) -> int:
    return 2 ** (len(model.config.down_block_types) - 1)


def trained(model: Any) -> int | None:
    """The size the weights were last trained at: 512 for 1.5, 768 for 2.1, 1024 for XL."""
    side = model.config.sample_size
    return (side * 8) ** 2 if isinstance(side, int) else None


FAMILY = Family(
    name="Stable Diffusion UNet (1.5, 2, XL)",
    denoisers=("UNet2DConditionModel",),
    read=read,
    site="Transformer2DModel",
    staging=Staging(
        pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        cell=lambda pipe: pipe.vae_scale_factor,
        unit=unit,
        trained=trained,
        others="its loop uses a condition or a picture of the full size",
    ),
)
