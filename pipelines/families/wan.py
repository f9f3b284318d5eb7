"""Wan 2.1, 2.2, VACE and SkyReels V2: latents [B, C, T, H, W], text by cross-attention."""

from typing import Any

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Condition, Family, Size, Staging


def read(model: Any, arguments: Arguments) -> TokenLayout:
    _, _, frames, height, width = arguments["hidden_states"].shape
    t, h, w = model.config.patch_size
    return TokenLayout((frames // t, height // h, width // w))


# by attention heads: 1.3B and 14B from 480p on, 2.2 5B at 720p
_TRAINED = {12: 480 * 832, 40: 480 * 832, 24: 704 * 1280}


def trained(model: Any) -> int | None:
    return _TRAINED.get(model.config.num_attention_heads)


def rebind(pipe: Any, size: Size, arguments: Arguments) -> dict[str, Any]:
    """2.2 5B is told the timestep of every token; without a condition they are all the same.

    With one they come from a mask of the first frame, which has the size already.
    """
    timestep = arguments["timestep"]
    if timestep.ndim < 2:
        return {}
    patch = pipe.transformer.config.patch_size
    frames = arguments["hidden_states"].shape[2] // patch[0]
    tokens = frames * (size.rows // patch[1]) * (size.columns // patch[2])
    return {} if timestep.shape[1] == tokens else {"timestep": timestep[:, :1].expand(-1, tokens)}


FAMILY = Family(
    name="Wan",
    denoisers=("WanTransformer3DModel", "WanVACETransformer3DModel",
               "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"),
    read=read,
    staging=Staging(
        pipelines=("WanPipeline",),
        cell=lambda pipe: pipe.vae_scale_factor_spatial,
        unit=lambda model: model.config.patch_size[-1],
        trained=trained,
        conditions={"WanImageToVideoPipeline": Condition(
            pictures=("video_processor",), remade=("prepare_latents",))},
        others="its loop was not examined",
        rebind=rebind,
    ),
)
