"""HunyuanVideo: latents [B, C, T, H, W], joint attention with the text after the grid."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, text_tokens


def read(model: nn.Module, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    p, pt = model.config.patch_size, model.config.patch_size_t
    grid = (frames // pt, height // p, width // p)
    return TokenLayout(grid, after=text_tokens(arguments))


FAMILY = Family(name="HunyuanVideo", denoisers=("HunyuanVideoTransformer3DModel",), read=read)
