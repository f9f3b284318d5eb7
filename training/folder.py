"""A run's result as the folder of a diffusers pipeline: parts in bf16, index and defaults."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from .state import folder_sizes


def write_folder(
    folder: Path, pipeline: str, index: dict[str, Any], parts: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Save every part; returns the sizes in megabytes.

    pipeline: class name. index: the rest of `model_index.json`. parts: modules, tokenizers and
    schedulers by component name; modules are stored in bf16. defaults: the `fastdiff.json`.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part = deepcopy(part).to("cpu", torch.bfloat16)
        part.save_pretrained(folder / name)
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **index}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if defaults is not None:
        (folder / "fastdiff.json").write_text(json.dumps(defaults, indent=2) + "\n")
    return folder_sizes(folder)


def of_length(tokenizer: PreTrainedTokenizerFast, tokens: int) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that pads and cuts to `tokens`."""
    copy = deepcopy(tokenizer)
    copy.model_max_length = tokens
    return copy
