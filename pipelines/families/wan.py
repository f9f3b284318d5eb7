"""Wan 2.1, 2.2, VACE and SkyReels V2: latents [B, C, T, H, W], text by cross-attention."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family


def read(model: nn.Module, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    t, h, w = model.config.patch_size
    return TokenLayout((frames // t, height // h, width // w))


FAMILY = Family(
    name="Wan",
    denoisers=("WanTransformer3DModel", "WanVACETransformer3DModel",
               "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"),
    read=read,
)
