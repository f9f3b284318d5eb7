"""Flux and Chroma: packed latents, text before the grid, the grid known to `img_ids` only."""

from torch import Tensor, nn

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family, text_tokens


def read(model: nn.Module, arguments: Arguments) -> TokenLayout | tuple[TokenLayout, Tensor]:
    layout = TokenLayout(
        (1, 1, arguments["hidden_states"].shape[1]), before=text_tokens(arguments)
    )
    ids = arguments.get("img_ids")
    if ids is None:
        return layout
    return layout, ids[0] if ids.ndim == 3 else ids


FAMILY = Family(
    name="Flux", denoisers=("FluxTransformer2DModel", "ChromaTransformer2DModel"), read=read
)
