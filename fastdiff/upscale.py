"""upscale_video: one call of a pipeline at a size that its model was not trained for."""

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastdiff import api
from fastdiff.pipelines.freeswim import FreeSwim
from fastdiff.pipelines.staged.call import attributes
from fastdiff.pipelines.upscale.call import CLIP

# knobs of FreeSwim besides the target: no arguments of a pipeline's call
_KNOBS = tuple(knob.name for knob in fields(FreeSwim) if knob.name != "target")

_CLIPS = "tensors [F, 3, H, W] or [B, F, 3, H, W], arrays [F, H, W, 3], or a list of PIL pictures"


def upscale_video(
    pipe: Any, *args: Any, target: tuple[int, int] | str, video: Any = None, **arguments: Any
) -> Any:
    """Call `pipe` and get its clip, or picture, at `target` (height, width) in pixels.

    args, arguments: of the pipeline's call, whose height and width are those the model was trained
    at, and knobs of FreeSwim by name (mode, interval, strength, shift, folder ...).
    video: a clip to begin with instead of making one: frames as a tensor [F, 3, H, W] or
        [B, F, 3, H, W] in 0..1, an array [F, H, W, 3] in 0..1 or of bytes, or a list of PIL
        pictures. The prompt should say what it shows.
    Methods that are on stay on, and so does everything after the call. The result has the report
    of this call as `result.report`, unless it is a tuple (return_dict=False).

    Raises ValueError where FreeSwim cannot work on the pipeline, with what is accepted.
    """
    knobs = {name: arguments.pop(name) for name in _KNOBS if name in arguments}
    method = FreeSwim(target=target, **knobs)
    clip = {} if video is None else {CLIP: as_frames(video)}
    with api.as_before(pipe) as (before, strict):
        upscaling = api.enable(
            pipe, *(m for m in before if m.kind != "sampling"), method, strict=strict)
        with attributes(pipe, **clip):
            result = pipe(*args, **arguments)
    if not isinstance(result, tuple):
        upscaling.report.finish()
        result.report = upscaling.report
    return result


def as_frames(video: Any) -> Tensor:
    """Any clip that `upscale_video` takes as float32 [B, F, 3, H, W] in 0..1."""
    import numpy as np

    if isinstance(video, (str, os.PathLike)) or (isinstance(video, Sequence) and not video):
        raise ValueError(f"video={video!r} is no clip: accepted are its frames, {_CLIPS}")
    if isinstance(video, Sequence) and not isinstance(video[0], Tensor):
        video = np.stack([np.asarray(picture) for picture in video])
    if isinstance(video, Sequence):
        video = torch.stack(list(video))
    if not isinstance(video, Tensor):
        array = torch.from_numpy(np.ascontiguousarray(video))
        video = array.movedim(-1, -3) if array.ndim > 2 else array
    if video.dtype == torch.uint8:
        video = video.float() / 255
    video = video.float()
    video = video[None] if video.ndim == 4 else video
    if video.ndim != 5 or video.shape[2] != 3 or not video.numel():
        raise ValueError(f"video of shape {tuple(video.shape)} is no clip: accepted are {_CLIPS}")
    # the other way round, NaN would pass
    if not (video.min() >= 0 and video.max() <= 1):
        raise ValueError(f"video has values from {float(video.min()):.3g} to "
                         f"{float(video.max()):.3g}: accepted are 0 to 1, or bytes")
    return video
