"""The parts of `tiny-image` in their genuine classes: Flux denoiser, AutoencoderKL, T5 and CLIP."""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .text import EOS, PAD, TOKENS, t5_numbers

CHANNELS = 16


def build_codec(config: dict) -> AutoencoderKL:
    """An untrained `AutoencoderKL` of 8x space and 16 channels, without attention."""
    widths = list(config["widths"])
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=512,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    # start with little posterior noise: at a deviation of one the decoder would see noise only
    with torch.no_grad():
        vae.quant_conv.bias[CHANNELS:] = -6.0
    return vae


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make latents zero mean and unit deviation by channel, exactly, within the 1x1 convolutions.

    The pipeline knows one scale for all channels only. `mean` and `std` are [16].
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:CHANNELS] /= std.view(-1, 1, 1, 1)
    before.bias[:CHANNELS] = (before.bias[:CHANNELS] - mean) / std
    before.bias[CHANNELS:] -= 2 * std.log()
    after.bias += after.weight.flatten(1) @ mean
    after.weight *= std.view(1, -1, 1, 1)


def build_prompt_encoders(config: dict) -> tuple[T5EncoderModel, CLIPTextModel]:
    """The T5 encoder whose tokens the denoiser attends to, and CLIP for the pooled vector."""
    t5 = T5EncoderModel(T5Config(**t5_numbers(config, config["vocabulary"])))
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config["vocabulary"],
            hidden_size=config["pooled_dim"],
            intermediate_size=2 * config["pooled_dim"],
            num_hidden_layers=1,
            num_attention_heads=config["pooled_dim"] // 32,
            max_position_embeddings=TOKENS,
            pad_token_id=PAD,
            bos_token_id=PAD,
            eos_token_id=EOS,
            projection_dim=config["pooled_dim"],
        )
    )
    return t5, clip


def encode_prompts(
    t5: T5EncoderModel, clip: CLIPTextModel, ids: Tensor, padded: int = TOKENS
) -> tuple[Tensor, Tensor]:
    """Token outputs [B, padded, D] and pooled vectors [B, P] of ids [B, TOKENS].

    As in `FluxPipeline` no mask goes to T5: it learns by itself to pass over padding.
    """
    wide = nn.functional.pad(ids, (0, padded - TOKENS), value=PAD)
    hidden = t5(wide, output_hidden_states=False)[0]
    return hidden, clip(ids).pooler_output


def build_joint(config: dict, text: dict) -> FluxTransformer2DModel:
    """An untrained Flux denoiser; every layer starts as the identity."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=config["double_layers"],
        num_single_layers=config["single_layers"],
        attention_head_dim=64,
        num_attention_heads=config["heads"],
        joint_attention_dim=text["dim"],
        pooled_projection_dim=text["pooled_dim"],
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for block in model.single_transformer_blocks:
        nn.init.zeros_(block.norm.linear.weight)
        nn.init.zeros_(block.norm.linear.bias)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.norm_out.linear.bias)
    nn.init.normal_(model.proj_out.weight, std=0.02)
    nn.init.zeros_(model.proj_out.bias)
    return model


def pack(latents: Tensor) -> Tensor:
    """[B, 16, H, W] to tokens [B, H/2 * W/2, 64] in the order of `FluxPipeline`."""
    b, c, h, w = latents.shape
    x = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, edge: int) -> Tensor:
    """Tokens of a square picture of `edge` latent cells back to [B, 16, edge, edge]."""
    b, _, c = tokens.shape
    x = tokens.view(b, edge // 2, edge // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, edge, edge)


def image_ids(edge: int, device: torch.device) -> Tensor:
    """Position ids [edge/2 * edge/2, 3] of a square picture: zero, row, column."""
    axis = torch.arange(edge // 2, device=device, dtype=torch.float32)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
