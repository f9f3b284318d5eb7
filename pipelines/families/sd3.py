"""Stable Diffusion 3 and 3.5: latents [B, C, H, W], joint attention, text after the grid."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, text_tokens


def read(model: nn.Module, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    p = model.config.patch_size
    return TokenLayout((1, height // p, width // p), after=text_tokens(arguments))


FAMILY = Family(name="SD3", denoisers=("SD3Transformer2DModel",), read=read)
