"""All models of a `tiny-image` run with their records, and the genuine `FluxPipeline` folder."""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from .folder import of_length, write_folder
from .image_models import build_codec, build_joint, build_prompt_encoders
from .judge import load_judge
from .optim import Average, Optimizer
from .state import State
from .text import TOKENS, build_tokenizer, wrap_tokenizer

SHIFT_AT_256, SHIFT_AT_4096 = 2.0, 6.0
"""How far the scheduler moves noise levels, by the number of image tokens."""


class ImageState(State):
    """Text encoders, autoencoder and denoiser on one device; the judge is the shipped one."""

    def __init__(self, config: dict, device: torch.device):
        torch.manual_seed(config["seed"])
        self.config = config
        self.device = device
        self.tokenizer = build_tokenizer(config["text"]["vocabulary"])
        t5, clip = build_prompt_encoders(config["text"])
        self.text, self.clip = t5.to(device), clip.to(device)
        self.vae = build_codec(config["codec"]).to(device)
        self.denoiser = build_joint(config["denoiser"], config["text"]).to(device)
        for module in self.modules().values():
            module.float()
        self.classifier = load_judge(device)
        self.average = Average(self.denoiser, config["denoiser"]["average"])
        self.optimizer = Optimizer(self.denoiser, config["denoiser"])
        self.record = {"stages": {}, "figures": {}, "latents": None}

    def modules(self) -> dict[str, nn.Module]:
        return {"text": self.text, "clip": self.clip, "vae": self.vae, "raw": self.denoiser}

    def load_folder(self, folder: Path) -> None:
        """Weights of a pipeline folder; the average weights start the raw ones."""
        for name, module in (
            ("text_encoder_2", self.text),
            ("text_encoder", self.clip),
            ("vae", self.vae),
            ("transformer", self.denoiser),
        ):
            load_part(folder / name, module)
        path = folder / "tokenizer" / "tokenizer.json"
        self.tokenizer = wrap_tokenizer(Tokenizer.from_file(str(path)))
        self.average = Average(self.denoiser, self.config["denoiser"]["average"])
        for name in ("text", "codec", "small"):
            self.stage(name)["done"] = True


def load_part(folder: Path, module: nn.Module) -> None:
    """The only safetensors file of a component folder into `module`; every weight must be there."""
    (path,) = folder.glob("*.safetensors")
    missing, unexpected = module.load_state_dict(load_file(path), strict=False)
    missing = [name for name in missing if not name.endswith("embed_tokens.weight")]
    if missing or unexpected:
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")


def build_image_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        use_dynamic_shifting=True,
        base_shift=math.log(SHIFT_AT_256),
        max_shift=math.log(SHIFT_AT_4096),
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=1.0,
    )


def shift_of(tokens: int) -> float:
    """The shift that the scheduler above uses for a picture of `tokens` image tokens."""
    low, high = math.log(SHIFT_AT_256), math.log(SHIFT_AT_4096)
    return math.exp(low + (high - low) * (tokens - 256) / (4096 - 256))


def export_image(state: ImageState, folder: Path) -> dict[str, float]:
    """Save every part in bf16; returns the sizes in megabytes."""
    parts = {
        "transformer": state.averaged(),
        "vae": state.vae,
        "text_encoder": state.clip,
        "text_encoder_2": state.text,
        "tokenizer": of_length(state.tokenizer, TOKENS),
        "tokenizer_2": of_length(state.tokenizer, 512),
        "scheduler": build_image_scheduler(),
    }
    index = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return write_folder(folder, "FluxPipeline", index, parts, image_defaults(state.config))


def image_defaults(config: dict) -> dict[str, Any]:
    """The `fastdiff.json` of the folder: what the model makes best."""
    settings = config["evaluation"]
    return {
        "kind": ["image"],
        "height": config["edge"],
        "width": config["edge"],
        "steps": settings["steps"],
        "max_sequence_length": TOKENS,
        "multiple": 16,
        "call": {"true_cfg_scale": settings["guidance"], "negative_prompt": ""},
        "license": "Apache-2.0, sprites MIT",
        "summary": "40 objects on 12 background colours",
    }
