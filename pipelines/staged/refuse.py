"""What pipelines that take a picture refuse when sampling changes the size."""

from typing import Any

from torch import Tensor


def whole_strength(call: dict[str, Any]) -> None:
    """A ValueError where the call starts from its picture instead of from noise."""
    if call["strength"] != 1:
        raise ValueError(f"strength={call['strength']:g} starts from the picture, and stages start "
                         "from noise: give strength=1.0, or disable_fastdiff()")


def pictures_only(call: dict[str, Any], *names: str, channels: int) -> None:
    """A ValueError where one of these arguments is latents, which are not resized."""
    for name in names:
        given = call[name]
        given = given[0] if isinstance(given, list) and given else given
        latent = isinstance(given, Tensor) and given.ndim >= 3 and given.shape[-3] == channels
        if latent or (name.endswith("latents") and given is not None):
            raise ValueError(f"{name}= holds latents, which cannot be made anew for the size of "
                             "every stage: give the picture itself")
