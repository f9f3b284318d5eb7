"""The parts of `tiny-unet` in their genuine classes, its state, and the pipeline folder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .folder import of_length, write_folder
from .image_models import CHANNELS, build_codec
from .image_state import load_part
from .optim import Average, Optimizer
from .state import State
from .text import EOS, PAD, TOKENS, build_tokenizer


def build_clip(config: dict) -> CLIPTextModel:
    """The text encoder; as in `StableDiffusionPipeline` padding is not masked."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=config["vocabulary"], hidden_size=config["dim"],
        intermediate_size=4 * config["dim"], num_hidden_layers=config["layers"],
        num_attention_heads=max(1, config["dim"] // 32), max_position_embeddings=TOKENS,
        pad_token_id=PAD, bos_token_id=PAD, eos_token_id=EOS,
    ))


def build_unet(config: dict, text_dim: int) -> UNet2DConditionModel:
    """An untrained UNet in the form of SDXL's: attention at two levels, layers in stacks."""
    return UNet2DConditionModel(
        sample_size=64, in_channels=CHANNELS, out_channels=CHANNELS,
        block_out_channels=tuple(config["widths"]), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=tuple(config["layers"]),
        attention_head_dim=tuple(config["heads"]), cross_attention_dim=text_dim,
        norm_num_groups=16, use_linear_projection=True,
    )


def build_noise() -> DDIMScheduler:
    """Velocity prediction, from pure noise on, so that backgrounds can be any colour."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1,
    )


class UNetState(State):
    """Text encoder, autoencoder and UNet on one device."""

    def __init__(self, config: dict, device: torch.device):
        torch.manual_seed(config["seed"])
        self.config, self.device = config, device
        self.tokenizer = build_tokenizer(config["text"]["vocabulary"])
        self.text = build_clip(config["text"]).to(device)
        # the bank asks both encoders of `tiny-image`; here they are one
        self.clip = self.text
        self.vae = build_codec(config["codec"]).to(device).requires_grad_(False)
        self.denoiser = build_unet(config["denoiser"], config["text"]["dim"]).to(device)
        self.alphas = build_noise().alphas_cumprod.to(device)
        self.average = Average(self.denoiser, config["denoiser"]["average"])
        self.optimizer = Optimizer(self.denoiser, config["denoiser"])
        self.record = {"stages": {}, "figures": {}, "latents": None}

    def modules(self) -> dict[str, nn.Module]:
        return {"text": self.text, "vae": self.vae, "raw": self.denoiser}

    def load_codec(self, folder: Path) -> None:
        """The autoencoder of a `tiny-image` folder."""
        load_part(folder / "vae", self.vae)


def noised(alphas: Tensor, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [B, 16, H, W] at steps t [B], and the velocity that the UNet is to predict."""
    share = alphas[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    here = share.sqrt() * latents + (1 - share).sqrt() * noise
    return here, share.sqrt() * noise - (1 - share).sqrt() * latents


def export_unet(state: UNetState, folder: Path) -> dict[str, float]:
    """Save every part in bf16 as a StableDiffusionPipeline; returns the sizes in megabytes."""
    parts = {
        "unet": state.averaged(),
        "vae": state.vae,
        "text_encoder": state.text,
        "tokenizer": of_length(state.tokenizer, TOKENS),
        "scheduler": build_noise(),
    }
    index = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    defaults = unet_defaults(state.config)
    return write_folder(folder, "StableDiffusionPipeline", index, parts, defaults)


def unet_defaults(config: dict) -> dict[str, Any]:
    """The `fastdiff.json` of the folder: what the model makes best."""
    settings = config["evaluation"]
    return {
        "kind": ["image"],
        "height": config["edge"],
        "width": config["edge"],
        "steps": settings["steps"],
        "guidance": settings["guidance"],
        "multiple": 32,
        "call": {"guidance_rescale": 0.7},
        "license": "Apache-2.0, sprites MIT",
        "summary": "UNet in SDXL form: 40 objects on 12 background colours",
    }
