"""PixArt (alpha, Sigma) and DiT: latents [B, C, H, W], no text in the grid."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family


def read(model: nn.Module, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    p = model.config.patch_size
    return TokenLayout((1, height // p, width // p))


FAMILY = Family(
    name="PixArt", denoisers=("PixArtTransformer2DModel", "DiTTransformer2DModel"), read=read
)
