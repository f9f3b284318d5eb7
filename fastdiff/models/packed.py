"""Weights in 8 bits: int8 rows with a scale each, for models that must stay small in the package.

A matrix or a convolution W [out, ...] is stored as round(W / s) with s [out] = max |W[out]| / 127,
everything smaller as it is. The error of a weight is at most s / 2. What that does to pictures is
measured by `benchmarks/eight_bits.py`: `benchmarks/results/eight_bits.json`.
"""

from pathlib import Path
from typing import Any

__all__ = ["ENDING", "load_part", "pack", "pack_part", "unpack"]

ENDING = ".int8.safetensors"
SCALE = ".scale"
LEAST = 4096
"""Tensors of fewer elements stay as they are."""

Weights = dict[str, Any]
"""Tensors by name."""


def pack(weights: Weights) -> Weights:
    """int8 rows and `NAME.scale` (fp32 [out]) of the large tensors; the others in bf16."""
    import torch

    packed = {}
    for name, value in weights.items():
        if value.ndim < 2 or value.numel() < LEAST or not value.is_floating_point():
            kept = value.to(torch.bfloat16) if value.is_floating_point() else value
            packed[name] = kept.contiguous()
            continue
        rows = value.float().flatten(1)
        scale = rows.abs().amax(1).clamp_min(1e-12) / 127
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
        packed[name + SCALE] = scale
    return packed


def unpack(packed: Weights, dtype: Any) -> Weights:
    """The weights that `pack` was given, in the torch dtype `dtype`."""
    import torch

    weights = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if value.dtype == torch.int8:
            scale = packed[name + SCALE].view(-1, *(1 for _ in value.shape[1:]))
            value = value.float() * scale
        weights[name] = value.to(dtype) if value.is_floating_point() else value
    return weights


def load_part(folder: Path, kind: Any, dtype: Any) -> Any:
    """A component of class `kind` out of a folder with packed weights; None where they are not.

    Raises: ValueError where the file and the class do not fit.
    """
    from safetensors.torch import load_file

    found = sorted(folder.glob("*" + ENDING))
    if not found:
        return None
    weights = unpack(load_file(found[0]), dtype)
    if hasattr(kind, "load_config"):
        module = kind.from_config(kind.load_config(folder, local_files_only=True))
    else:
        module = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    missing, unexpected = module.load_state_dict(weights, strict=False)
    tied = set(getattr(module, "all_tied_weights_keys", None) or ())
    missing = sorted(set(missing) - tied)
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module.to(dtype).eval()


def pack_part(folder: Path) -> Path:
    """Replace the only .safetensors file of a component folder by a packed one; its path."""
    from safetensors.torch import load_file, save_file

    (path,) = [p for p in folder.glob("*.safetensors") if not p.name.endswith(ENDING)]
    packed = path.with_name(path.name.removesuffix(".safetensors") + ENDING)
    save_file(pack(load_file(path)), packed, metadata={"format": "pt"})
    path.unlink()
    return packed
