"""UNets of Stable Diffusion 1.5, 2 and XL: every Transformer2DModel has its own grid."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family


def read(block: nn.Module, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout((1, height, width))


FAMILY = Family(
    name="Stable Diffusion UNet (1.5, 2, XL)",
    denoisers=("UNet2DConditionModel",),
    read=read,
    site="Transformer2DModel",
)
