"""CogVideoX and ConsisID: latents [B, T, C, H, W], joint attention, text before the grid."""

from typing import Any

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import (
    Arguments,
    Condition,
    Family,
    Size,
    Staging,
    text_tokens,
)


def read(model: Any, arguments: Arguments) -> TokenLayout:
    _, frames, _, height, width = arguments["hidden_states"].shape
    p, pt = model.config.patch_size, model.config.patch_size_t or 1
    grid = (frames // pt, height // p, width // p)
    return TokenLayout(grid, before=text_tokens(arguments))


def rebind(pipe: Any, size: Size, arguments: Arguments) -> dict[str, Any]:
    if arguments.get("image_rotary_emb") is None:
        return {}
    latents = arguments["hidden_states"]
    return {"image_rotary_emb": pipe._prepare_rotary_positional_embeddings(
        size.height, size.width, latents.shape[1], latents.device)}


def trained(model: Any) -> int:
    """1.0 at 480 x 720, 1.5 (which cuts time into patches too) at 768 x 1360."""
    return 480 * 720 if model.config.patch_size_t is None else 768 * 1360


def fixed(model: Any) -> str | None:
    if model.config.use_learned_positional_embeddings:
        return "its weights have a learned embedding for every place of one size"
    return None


FAMILY = Family(
    name="CogVideoX",
    denoisers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    read=read,
    staging=Staging(
        pipelines=("CogVideoXPipeline",),
        cell=lambda pipe: pipe.vae_scale_factor_spatial,
        unit=lambda model: model.config.patch_size,
        trained=trained,
        conditions={"CogVideoXImageToVideoPipeline": Condition(
            pictures=("video_processor",), remade=("prepare_latents",))},
        others="its loop was not examined",
        fixed=fixed,
        rebind=rebind,
    ),
)
