"""Tiny pipelines whose loop joins the latents with a condition made of a picture."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
import zoo
from PIL import Image
from torch import Tensor, nn

_WIDE = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def _parts(name: str, **changes: Any) -> dict[str, Any]:
    return {**zoo.build(name).components, **changes}


def _seen(parts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: part for key, part in parts.items() if key not in names}


def _wan(**changes: Any) -> Any:
    parts = _parts("wan", transformer=zoo.wan_transformer(in_channels=36), image_encoder=None,
                   image_processor=None, transformer_2=None)
    return diffusers.WanImageToVideoPipeline(**{**parts, **changes})


def _wan_clip() -> Any:
    """2.1: the picture is also read by an encoder, at the encoder's own size."""
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        intermediate_size=16, patch_size=8))
    return _wan(
        transformer=zoo.wan_transformer(in_channels=36, image_dim=4),
        image_encoder=encoder, image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))


def _wan_5b() -> Any:
    """2.2 5B: the first frame of the latents is the picture, and every token has its timestep."""
    return _wan(transformer=zoo.wan_transformer(), expand_timesteps=True)


def _cogvideox(**changes: Any) -> Any:
    config = dict(zoo.build("cogvideox").transformer.config)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    model = diffusers.CogVideoXTransformer3DModel(**{**config, "in_channels": 8, **changes})
    return diffusers.CogVideoXImageToVideoPipeline(**_parts("cogvideox", transformer=model))


def _flux_transformer(channels: int) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=16, num_layers=2, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8))


def _flux_kontext() -> Any:
    parts = _parts("flux", transformer=_flux_transformer(16))
    return diffusers.FluxKontextPipeline(**_seen(parts, "image_encoder", "feature_extractor"))


def _flux_fill() -> Any:
    # latents, those of the masked picture, and the mask's pixels: 2 x 2 cells of 2 x 2 pixels
    parts = _parts("flux", transformer=_flux_transformer(16 + 16 + 16))
    return diffusers.FluxFillPipeline(**_seen(parts, "image_encoder", "feature_extractor"))


def _unet(name: str, channels: int) -> nn.Module:
    config = dict(zoo.build(name).unet.config)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    return diffusers.UNet2DConditionModel(**{**config, "in_channels": channels})


def _inpaint(name: str, channels: int) -> Any:
    parts = _parts(name, unet=_unet(name, channels))
    if name == "sdxl":
        return diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def _controlnet(name: str, nets: int = 1) -> Any:
    parts = _parts(name)
    made = []
    for _ in range(nets):
        net = diffusers.ControlNetModel.from_unet(
            parts["unet"], conditioning_channels=3,
            conditioning_embedding_out_channels=(8, 8, 8, 8))
        # they begin as zeros, and would not show the condition
        for zero in [*net.controlnet_down_blocks, net.controlnet_mid_block,
                     net.controlnet_cond_embedding.conv_out]:
            nn.init.normal_(zero.weight, std=0.3)
        made.append(net)
    parts["controlnet"] = made[0] if nets == 1 else made
    if name == "sdxl":
        return diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


# name -> what builds it, and the pipeline of the zoo that it is like
_BUILD: dict[str, tuple[Callable[[], Any], str]] = {
    "wan-i2v": (_wan, "wan"),
    "wan-i2v-clip": (_wan_clip, "wan"),
    "wan-i2v-5b": (_wan_5b, "wan"),
    "cogvideox-i2v": (_cogvideox, "cogvideox"),
    "flux-kontext": (_flux_kontext, "flux"),
    "flux-fill": (_flux_fill, "flux"),
    "sd15-inpaint": (lambda: _inpaint("sd15", 4), "sd15"),
    "sd15-inpaint-9": (lambda: _inpaint("sd15", 9), "sd15"),
    "sdxl-inpaint": (lambda: _inpaint("sdxl", 4), "sdxl"),
    "sdxl-inpaint-9": (lambda: _inpaint("sdxl", 9), "sdxl"),
    "sd15-controlnet": (lambda: _controlnet("sd15"), "sd15"),
    "sd15-two-controlnets": (lambda: _controlnet("sd15", 2), "sd15"),
    "sdxl-controlnet": (lambda: _controlnet("sdxl"), "sdxl"),
}
NAMES = tuple(_BUILD)
MASKED = tuple(name for name in NAMES if "inpaint" in name or "fill" in name)


def cogvideox_with_learned_places() -> Any:
    return _quiet(_cogvideox(use_learned_positional_embeddings=True))


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return _quiet(_BUILD[name][0]())


def _quiet(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, as pictures have them, that shrink without loss of much."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return Image.fromarray((fine[0].permute(1, 2, 0) * 255).byte().numpy())


def mask(width: int, height: int) -> Image.Image:
    """The right half, and a thin line on the left."""
    made = torch.zeros(height, width, dtype=torch.uint8)
    made[:, width // 2 :] = 255
    made[:, width // 4] = 255
    return Image.fromarray(made.numpy())


def arguments(name: str, grid: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Of a call: size, picture, and mask where there is one."""
    size = zoo.size(_BUILD[name][1], grid)
    given = {**size, "image": picture(size["width"], size["height"])}
    if name in MASKED:
        given |= {"mask_image": mask(size["width"], size["height"]), "strength": 1.0}
    if name == "flux-kontext":
        # the output as asked for, the reference as it is
        given |= {"_auto_resize": False, "max_area": size["height"] * size["width"]}
    if "two" in name:
        given["image"] = [given["image"], picture(size["width"], size["height"], seed=1)]
    if name.startswith("wan"):
        given["max_sequence_length"] = zoo.TEXT
    return given


def call(name: str, pipe: Any, seed: int = 0, grid: tuple[int, int, int] | None = None,
         **changes: Any) -> Tensor:
    return zoo.call(_BUILD[name][1], pipe, seed, grid, **{**arguments(name, grid), **changes})
