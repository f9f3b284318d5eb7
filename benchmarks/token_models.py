"""The SDXL UNet at full size with random weights, and the token methods that are timed on it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import fastdiff  # noqa: E402
from fastdiff.method import Method  # noqa: E402
from fastdiff.tokens.at_edm import AtEdm  # noqa: E402
from fastdiff.tokens.kv_downsample import KVDownsample  # noqa: E402
from fastdiff.tokens.linfusion import LinFusion  # noqa: E402
from fastdiff.tokens.linfusion_format import LinearLayer, places, write  # noqa: E402
from fastdiff.tokens.tome import ToMe  # noqa: E402
from fastdiff.tokens.zero_tprune import ZeroTPrune  # noqa: E402

STEPS = 50
STOCK = "stock"


def sdxl(tiny: bool) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4,
        block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1 if tiny else 2, transformer_layers_per_block=(1, 2, 3 if tiny else 10),
        attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
        cross_attention_dim=64 if tiny else 2048, norm_num_groups=8 if tiny else 32,
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8 if tiny else 256,
        projection_class_embeddings_input_dim=80 if tiny else 2816,
    )


def materialised(dtype: torch.dtype, device: str, tiny: bool) -> nn.Module:
    with torch.device("meta"):
        model = sdxl(tiny)
    model = nn.Module.to(model, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return model


def inputs_of(edge: int, dtype: torch.dtype, device: str, tiny: bool) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    cells = edge // 8
    return {
        "sample": randn(2, 4, cells, cells), "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": randn(2, 77, 64 if tiny else 2048),
        "added_cond_kwargs": {"text_embeds": randn(2, 32 if tiny else 1280),
                              "time_ids": randn(2, 6)},
    }


def linfusion_weights(model: nn.Module, folder: Path) -> None:
    """Random weights of the published shapes for SDXL: added projections of a sixteenth."""
    layers = {}
    for place in places(model):
        place = place._replace(hidden=max(4, place.width // 16))
        with torch.device("meta"):
            layer = LinearLayer(place)
        layer = layer.to(torch.float16).to_empty(device="cpu")
        for parameter in layer.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        layers[place] = layer
    write(folder, layers)


def variants(folder: Path, few: bool) -> dict[str, tuple[Method, ...]]:
    off: dict[str, Any] = {"guard": False}
    keys = KVDownsample(min_tokens=0, **off)
    found: dict[str, tuple[Method, ...]] = {
        STOCK: (),
        "at-edm": (AtEdm(**off),),
        "kv-downsample": (keys,),
        "at-edm + kv-downsample": (AtEdm(**off), keys),
        "at-edm, guarded": (AtEdm(layout="all"),),
        "at-edm, all blocks": (AtEdm(layout="all", **off),),
        "at-edm, 5 iterations": (AtEdm(iterations=5, **off),),
        "at-edm, increment": (AtEdm(recover="increment", **off),),
        "zero-tprune": (ZeroTPrune(**off),),
        "kv-downsample, guarded": (KVDownsample(min_tokens=0),),
        "linfusion": (LinFusion(weights=str(folder)),),
        "tome 0.5": (ToMe(),),
    }
    return {name: methods for i, (name, methods) in enumerate(found.items()) if not few or i < 4}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def enabled(model: nn.Module, methods: tuple[Method, ...], middle: int = STEPS // 2) -> Any:
    """The model with these methods, in the middle of a run."""
    fastdiff.disable(model)
    if not methods:
        return None
    # a loop of its own, whose scheduler says that there are steps
    loop = SimpleNamespace(components={"model": model}, scheduler=EulerDiscreteScheduler())
    handle = fastdiff.enable(loop, *methods, strict=True)
    handle.clock.begin(STEPS)
    for _ in range(middle):
        handle.clock.advance()
    return handle
