"""Flux and Chroma: packed latents, text before the grid, the grid known to `img_ids` only."""

from typing import Any

from torch import Tensor, nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import (
    Arguments,
    Condition,
    Family,
    Size,
    Staging,
    text_tokens,
)
from fastdiff.pipelines.staged.refuse import pictures_only, whole_strength


def read(model: nn.Module, arguments: Arguments) -> TokenLayout | tuple[TokenLayout, Tensor]:
    layout = TokenLayout(
        (1, 1, arguments["hidden_states"].shape[1]), before=text_tokens(arguments)
    )
    ids = arguments.get("img_ids")
    if ids is None:
        return layout
    return layout, ids[0] if ids.ndim == 3 else ids


def unpack(model: nn.Module, latents: Tensor, size: Size) -> Tensor:
    """[B, S, 4 C], each token a square of 2 x 2 cells, to [B, C, rows, columns]."""
    cells = latents.unflatten(2, (-1, 2, 2)).unflatten(1, (size.rows // 2, size.columns // 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def pack(model: nn.Module, latents: Tensor, size: Size) -> Tensor:
    cells = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


def rebind(pipe: Any, size: Size, arguments: Arguments) -> dict[str, Any]:
    ids = arguments["img_ids"]
    if ids.shape[0] == arguments["hidden_states"].shape[1]:
        return {}
    return {"img_ids": pipe._prepare_latent_image_ids(
        1, size.rows // 2, size.columns // 2, ids.device, ids.dtype)}


def trained(model: Any) -> int | None:
    return 512 * 512 if model.config.num_attention_heads == 24 else None


def check_kontext(pipe: Any, call: dict[str, Any]) -> None:
    pictures_only(call, "image", channels=pipe.latent_channels)


def check_fill(pipe: Any, call: dict[str, Any]) -> None:
    """Its schedule is set before its latents are made, by the size of the call."""
    side = pipe.default_sample_size * pipe.vae_scale_factor
    call["height"], call["width"] = call["height"] or side, call["width"] or side
    whole_strength(call)
    pictures_only(call, "image", "masked_image_latents", channels=pipe.latent_channels)


FAMILY = Family(
    name="Flux",
    denoisers=("FluxTransformer2DModel", "ChromaTransformer2DModel"),
    read=read,
    staging=Staging(
        pipelines=("FluxPipeline",),
        cell=lambda pipe: pipe.vae_scale_factor,
        unit=lambda model: 2,
        whole=True,
        trained=trained,
        conditions={
            "FluxKontextPipeline": Condition(
                pictures=("image_processor",), remade=("prepare_latents",), own_size=True,
                check=check_kontext),
            "FluxFillPipeline": Condition(
                pictures=("image_processor",), masks=("mask_processor",),
                remade=("prepare_mask_latents",), check=check_fill),
        },
        others="its loop was not examined, or starts from a picture",
        unpack=unpack,
        pack=pack,
        rebind=rebind,
    ),
)
