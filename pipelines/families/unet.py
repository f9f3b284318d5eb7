"""UNets of Stable Diffusion 1.5, 2 and XL: every Transformer2DModel has its own grid."""

from dataclasses import replace
from typing import Any

from torch import nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Condition, Family, Staging
from fastdiff.pipelines.staged.refuse import pictures_only, whole_strength


def read(block: nn.Module, arguments: Arguments) -> TokenLayout:
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout((1, height, width))


def unit(model: Any) -> int:
    return 2 ** (len(model.config.down_block_types) - 1)


def trained(model: Any) -> int | None:
    """The size the weights were last trained at: 512 for 1.5, 768 for 2.1, 1024 for XL."""
    side = model.config.sample_size
    return (side * 8) ** 2 if isinstance(side, int) else None


def check_inpaint(pipe: Any, call: dict[str, Any]) -> None:
    whole_strength(call)
    pictures_only(call, "image", "masked_image_latents", channels=pipe.vae.config.latent_channels)


def check_inpaint_xl(pipe: Any, call: dict[str, Any]) -> None:
    """Size conditioning is the whole picture's; this pipeline reads it off its first latents."""
    check_inpaint(pipe, call)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    size = tuple(given // pipe.vae_scale_factor * pipe.vae_scale_factor
                 for given in (call["height"] or side, call["width"] or side))
    call["original_size"] = call["original_size"] or size
    call["target_size"] = call["target_size"] or size


_INPAINT = Condition(
    pictures=("image_processor",), masks=("mask_processor",),
    remade=("prepare_latents", "prepare_mask_latents"), check=check_inpaint)
_CONTROL = Condition(pictures=("control_image_processor",), models=("controlnet",))

FAMILY = Family(
    name="Stable Diffusion UNet (1.5, 2, XL)",
    denoisers=("UNet2DConditionModel",),
    read=read,
    site="Transformer2DModel",
    staging=Staging(
        pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        cell=lambda pipe: pipe.vae_scale_factor,
        unit=unit,
        trained=trained,
        conditions={
            "StableDiffusionInpaintPipeline": _INPAINT,
            "StableDiffusionXLInpaintPipeline": replace(_INPAINT, check=check_inpaint_xl),
            "StableDiffusionControlNetPipeline": _CONTROL,
            "StableDiffusionXLControlNetPipeline": _CONTROL,
        },
        others="its loop was not examined, or starts from a picture",
    ),
)
