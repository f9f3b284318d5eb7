"""LTX-Video: packed latents [B, S, C], the grid named by the caller, no text in the grid."""

from typing import Any

from torch import Tensor

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, Size, Staging


def read(model: Any, arguments: Arguments) -> TokenLayout | None:
    sizes = (arguments.get("num_frames"), arguments.get("height"), arguments.get("width"))
    if None in sizes:
        return None  # condition pipelines pass coordinates of single tokens instead
    p, pt = model.config.patch_size, model.config.patch_size_t
    return TokenLayout((sizes[0] // pt, sizes[1] // p, sizes[2] // p))


def unpack(model: Any, latents: Tensor, size: Size) -> Tensor:
    """[B, S, C pt p p] to [B, C, T, rows, columns]."""
    p, pt = model.config.patch_size, model.config.patch_size_t
    cells = latents.unflatten(2, (-1, pt, p, p))
    cells = cells.unflatten(1, (-1, size.rows // p, size.columns // p))
    return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def pack(model: Any, latents: Tensor, size: Size) -> Tensor:
    p, pt = model.config.patch_size, model.config.patch_size_t
    cells = latents.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, pt))
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def rebind(pipe: Any, size: Size, arguments: Arguments) -> dict[str, Any]:
    return {"height": size.rows, "width": size.columns}


def trained(model: Any) -> int | None:
    """The smallest size of its authors is not published; this is their pipeline's own."""
    return 512 * 704 if model.config.num_attention_heads == 32 else None


FAMILY = Family(
    name="LTX",
    denoisers=("LTXVideoTransformer3DModel",),
    read=read,
    staging=Staging(
        pipelines=("LTXPipeline",),
        cell=lambda pipe: pipe.vae_spatial_compression_ratio,
        unit=lambda model: model.config.patch_size,
        trained=trained,
        others="its loop knows the tokens of a condition by their coordinates",
        unpack=unpack,
        pack=pack,
        rebind=rebind,
    ),
)
