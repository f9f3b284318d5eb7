"""CogVideoX and ConsisID: latents [B, T, C, H, W], joint attention, text before the grid."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, text_tokens


def read(model: nn.Module, arguments: Arguments) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape
    p, pt = model.config.patch_size, model.config.patch_size_t or 1
    grid = (frames // pt, height // p, width // p)
    return TokenLayout(grid, before=text_tokens(arguments))


FAMILY = Family(
    name="CogVideoX",
    denoisers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    read=read,
)
