"""HunyuanVideo: latents [B, C, T, H, W], joint attention with the text after the grid."""

from typing import Any

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, Staging, text_tokens


def read(model: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    p, pt = model.config.patch_size, model.config.patch_size_t
    grid = (frames // pt, height // p, width // p)
    return TokenLayout(grid, after=text_tokens(arguments))


def trained(model: Any) -> int | None:
    """Its authors trained at 256p, 360p, 540p and 720p in turn; 360 rows are 352 in whole units."""
    return 352 * 640 if model.config.num_attention_heads == 24 else None


FAMILY = Family(
    name="HunyuanVideo",
    denoisers=("HunyuanVideoTransformer3DModel",),
    read=read,
    staging=Staging(
        pipelines=("HunyuanVideoPipeline",),
        cell=lambda pipe: pipe.vae_scale_factor_spatial,
        unit=lambda model: model.config.patch_size,
        trained=trained,
        others="its loop joins the latents with a condition of the full size",
    ),
)
