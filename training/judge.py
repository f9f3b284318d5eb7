"""The committed weights of the classifier that judges generated frames."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from .classifier import Classifier

WEIGHTS = Path(__file__).parent / "evaluator.safetensors"
"""Stage "classifier" of `tiny_video.toml`, piece 3, stored in bf16."""


def load_judge(device: torch.device | str = "cpu") -> Classifier:
    """The frozen classifier in fp32 on `device`."""
    model = Classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.float().eval().requires_grad_(False).to(device)
