"""Models without a record: the grid read off unpacked latents and the configured patch size."""

from typing import Any

from fastdiff.layout import TokenLayout
from fastdiff.pipelines.families.base import Arguments, Family


def read(model: Any, arguments: Arguments) -> TokenLayout | None:
    """[B, C, H, W] or [B, C, T, H, W] latents; None, and so no sparse call, for anything else.

    Only attention over the grid alone is taken: where text stands in a joint sequence of an
    unknown model cannot be read off its input.
    """
    latents = next((arguments[n] for n in ("hidden_states", "sample", "x") if n in arguments), None)
    if latents is None or not hasattr(latents, "ndim") or latents.ndim not in (4, 5):
        return None
    config: Any = model.config
    patch = getattr(config, "patch_size", None) or 1
    patch_t = getattr(config, "patch_size_t", None) or 1
    pt, ph, pw = (patch_t, patch, patch) if isinstance(patch, int) else (1, 1, *patch)[-3:]
    frames = 1 if latents.ndim == 4 else latents.shape[2]
    return TokenLayout((frames // pt, latents.shape[-2] // ph, latents.shape[-1] // pw))


GENERIC = Family(name="generic", denoisers=(), read=read)
