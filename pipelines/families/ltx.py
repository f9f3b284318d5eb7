"""LTX-Video: packed latents [B, S, C], the grid named by the caller, no text in the grid."""

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family


def read(model: nn.Module, arguments: Arguments) -> TokenLayout | None:
    sizes = (arguments.get("num_frames"), arguments.get("height"), arguments.get("width"))
    if None in sizes:
        return None  # condition pipelines pass coordinates of single tokens instead
    p, pt = model.config.patch_size, model.config.patch_size_t
    return TokenLayout((sizes[0] // pt, sizes[1] // p, sizes[2] // p))


FAMILY = Family(name="LTX", denoisers=("LTXVideoTransformer3DModel",), read=read)
