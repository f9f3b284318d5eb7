"""Full-size architectures with random weights, built on the meta device, filled where they run.

Random weights: the time of a selection at a fixed density hardly depends on them; quality is
measured elsewhere, on trained models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What to build. build: (layers, tiny) -> model; inputs: tiny -> shapes, or tensors.

    layers: (that a benchmark runs, of the real model).
    """

    title: str
    build: Callable[[int, bool], nn.Module]
    inputs: Callable[[bool], Inputs]
    layers: tuple[int, int]


def wan(heads: int, ffn: int) -> Callable[[int, bool], nn.Module]:
    def build(layers: int, tiny: bool) -> nn.Module:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2 if tiny else heads, attention_head_dim=128,
            in_channels=16, out_channels=16, text_dim=64 if tiny else 4096, freq_dim=256,
            ffn_dim=64 if tiny else ffn, num_layers=layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
        )

    return build


def wan_inputs(latents: tuple[int, int, int]) -> Callable[[bool], Inputs]:
    return lambda tiny: {
        "hidden_states": (1, 16, *((3, 20, 24) if tiny else latents)),
        "encoder_hidden_states": (1, 16, 64) if tiny else (1, 512, 4096),
    }


def hunyuan(layers: int, tiny: bool) -> nn.Module:
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoTransformer3DModel,
    )

    return HunyuanVideoTransformer3DModel(
        num_attention_heads=2 if tiny else 24, num_layers=layers - layers // 2,
        num_single_layers=layers // 2, num_refiner_layers=1 if tiny else 2,
        text_embed_dim=64 if tiny else 4096,
    )


def hunyuan_inputs(tiny: bool) -> Inputs:
    grid, text = ((3, 20, 24), (1, 16, 64)) if tiny else ((33, 90, 160), (1, 256, 4096))
    return {"hidden_states": (1, 16, *grid), "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(text[:2], dtype=torch.bool),
            "pooled_projections": (1, 768), "guidance": torch.tensor([6000.0])}


def flux(layers: int, tiny: bool) -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    double = max(1, layers // 3)
    return FluxTransformer2DModel(
        num_layers=double, num_single_layers=max(1, layers - double), guidance_embeds=True,
        num_attention_heads=2 if tiny else 24, joint_attention_dim=64 if tiny else 4096,
    )


def flux_inputs(tiny: bool) -> Inputs:
    side, text = (20, (1, 16, 64)) if tiny else (128, (1, 512, 4096))
    place = torch.zeros(side, side, 3)
    place[..., 1] += torch.arange(side)[:, None]
    place[..., 2] += torch.arange(side)
    return {"hidden_states": (1, side * side, 64), "encoder_hidden_states": text,
            "pooled_projections": (1, 768), "img_ids": place.reshape(-1, 3),
            "txt_ids": torch.zeros(text[1], 3), "guidance": torch.tensor([3.5])}


ARCHITECTURES = {
    "wan-1.3b-480p": Architecture("Wan2.1 1.3B, 81 frames of 480 x 832: 32,760 tokens",
                                  wan(12, 8960), wan_inputs((21, 60, 104)), (30, 30)),
    "wan-14b-720p": Architecture("Wan2.1 14B, 81 frames of 720 x 1280: 75,600 tokens",
                                 wan(40, 13824), wan_inputs((21, 90, 160)), (4, 40)),
    "hunyuan-720p": Architecture("HunyuanVideo, 129 frames of 720 x 1280: 118,800 + 256 tokens",
                                 hunyuan, hunyuan_inputs, (4, 60)),
    "flux-2k": Architecture("Flux.1, 2048 x 2048: 16,384 + 512 tokens", flux, flux_inputs,
                            (12, 57)),
}


def materialise(
    architecture: Architecture, layers: int, device: str, tiny: bool
) -> tuple[nn.Module, Inputs]:
    """The model with random weights in bfloat16 (float32 on a CPU), and inputs of its size."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = architecture.build(layers, tiny)
    # past diffusers' advice on parts it keeps in float32: these weights are random
    model = nn.Module.to(model, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    rope = getattr(model, "rope", None)
    if rope is not None and next(rope.buffers(), None) is not None:
        # its tables are buffers, which to_empty left unset
        model.rope = type(rope)(128, (1, 2, 2), 1024).to(device)
    inputs: Inputs = {}
    for name, value in architecture.inputs(tiny).items():
        if isinstance(value, tuple):
            value = torch.randn(value, generator=generator, device=device)
        inputs[name] = value.to(device, value.dtype if value.dtype == torch.bool else dtype)
    for name in ("img_ids", "txt_ids"):
        if name in inputs:
            inputs[name] = inputs[name].float()
    inputs["timestep"] = torch.tensor([500], device=device)
    return model, inputs

