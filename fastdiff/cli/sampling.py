"""Run a pipeline for one prompt: legal sizes, call arguments, progress, time, sane output."""

import inspect
import math
import re
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from fastdiff.cli import choice
from fastdiff.cli.errors import InputError
from fastdiff.cli.sidecar import Settings

# name on the command line -> argument of a pipeline's call
_ARGUMENTS = {"negative": "negative_prompt", "steps": "num_inference_steps",
              "guidance": "guidance_scale", "height": "height", "width": "width",
              "frames": "num_frames"}
_TRUE_GUIDANCE = "true_cfg_scale"
# what the user types where it is not the name
_TYPED = {"height": "size", "width": "size"}

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """frames: float [F, H, W, 3] in 0..1."""

    frames: Any
    seconds: float
    settings: Settings


def check_size(settings: Settings, multiple: int | None, factor: int | None) -> None:
    """Refuse a size or frame count that the model cannot make, and name the nearest it can."""
    height, width, frames = settings.height, settings.width, settings.frames
    sides = [side for side in (height, width) if side is not None]
    if multiple and any(side % multiple for side in sides):
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in sides)
        raise InputError(f"the model cannot make {'x'.join(map(str, sides))} (height x width): "
                         f"sides are multiples of {multiple}; the nearest is {near}")
    if frames and factor and settings.kind == "video" and (frames - 1) % factor:
        below = (frames - 1) // factor * factor + 1
        raise InputError(f"the model cannot make {frames} frames: accepted is {factor} n + 1; "
                         f"the nearest are {below} and {below + factor}")


def size_rules(pipe: Any) -> tuple[int | None, int | None]:
    """(multiple of height and width, n of "n * k + 1" frames), as far as a pipeline shows them."""
    spatial = _first(pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio",
                     "vae_scale_factor")
    temporal = _first(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    if spatial is None:
        return None, temporal
    patch = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "patch_size", 1)
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    multiple = spatial * (patch if isinstance(patch, int) else 1)
    for processor in ("image_processor", "video_processor"):
        # Flux packs latents two by two, and says so only here
        config = getattr(getattr(pipe, processor, None), "config", None)
        multiple = math.lcm(multiple, int(getattr(config, "vae_scale_factor", 1) or 1))
    return multiple, temporal


def check_pipeline(
    pipe: Any, settings: Settings, asked: Set[str], supplied: Set[str] = frozenset()
) -> None:
    """Refuse what this pipeline has no argument for.

    asked: names the user gave a value for. supplied: arguments that come besides the settings.
    """
    accepted = parameters(pipe)
    name = type(pipe).__name__
    needed = [p.name for p in accepted.values()
              if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
              and p.name not in ("prompt", *supplied)]
    for argument in supplied:
        if argument not in accepted:
            raise InputError(f"{name} takes no {argument}")
    if "prompt" not in accepted or needed:
        raise InputError(f"{name} needs {' and '.join(needed) or 'no prompt'}: "
                         "fastdiff generate makes pictures and clips from text alone")
    if settings.kind == "video" and "num_frames" not in accepted:
        raise InputError(f"{name} makes pictures, not clips: use --image")
    for option, argument in _ARGUMENTS.items():
        typed = _TYPED.get(option, option)
        if typed in asked and argument not in accepted and not (
                option == "frames" and settings.kind == "image"):
            raise InputError(f"{name} has no {argument}: leave --{typed} out")


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a pipeline's call, by name."""
    found = dict(inspect.signature(type(pipe).__call__).parameters)
    found.pop("self", None)
    return found


def sample(pipe: Any, settings: Settings, on_step: OnStep, **changes: Any) -> Result:
    """Run once. changes: other arguments of the pipeline's call, for a warm-up."""
    arguments = {**_arguments(pipe, settings, on_step), **changes}
    found, seconds = _call(pipe, settings, arguments)
    if arguments["output_type"] == "latent":
        return Result(None, seconds, settings)
    return _result(pipe, settings, found[0], seconds)


def sample_together(
    pipe: Any, several: Sequence[Settings], on_step: OnStep, **changes: Any
) -> list[Result | InputError]:
    """Run several in one call, each with the noise of its own seed.

    They differ in prompt, negative prompt and seed alone. seconds is each one's share. What came
    out as NaN is an error in its place.
    """
    import torch

    arguments = {**_arguments(pipe, several[0], on_step), **changes}
    if len(several) > 1:
        arguments["prompt"] = [one.prompt for one in several]
        arguments["generator"] = [torch.Generator("cpu").manual_seed(one.seed) for one in several]
        if "negative_prompt" in arguments:
            own = arguments["negative_prompt"]
            arguments["negative_prompt"] = [own if one.negative is None else one.negative
                                            for one in several]
    found, seconds = _call(pipe, several[0], arguments)
    results: list[Result | InputError] = []
    for one, frames in zip(several, found, strict=True):
        try:
            results.append(_result(pipe, one, frames, seconds / len(several)))
        except InputError as error:
            results.append(error)
    return results


def _call(pipe: Any, settings: Settings, arguments: dict[str, Any]) -> tuple[Any, float]:
    """What came out, one entry a prompt, and the seconds."""
    import torch

    begin = time.perf_counter()
    try:
        output = pipe(**arguments)
    except ValueError as error:
        raise InputError(_with_nearest(str(error), settings)) from error
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    found = getattr(output, "images", None)
    found = getattr(output, "frames", None) if found is None else found
    if found is None:
        raise InputError(f"{type(pipe).__name__} returns neither images nor frames")
    return found, seconds


def _result(pipe: Any, settings: Settings, found: Any, seconds: float) -> Result:
    import numpy as np

    frames = np.asarray(found, dtype="float32")
    frames = frames[None] if frames.ndim == 3 else frames
    if not np.isfinite(frames).all():
        raise InputError(f"the model produced NaN in {settings.dtype}, so nothing was written: "
                         f"try {_without_nan(settings)}")
    return Result(frames, seconds, _resolved(pipe, settings, frames))


def _without_nan(settings: Settings) -> str:
    more = [] if settings.dtype == "float32" else ["--dtype float32"]
    more += [] if settings.plan is None else ["--method stock, to see whether it is the method"]
    return ", or ".join(more) or "another seed, or check the weights"


def arguments_of(settings: Settings) -> dict[str, Any]:
    """The arguments of a call that settings name; what the user gave goes before the model's own.

    Models with a true guidance beside an embedded one take the former, and say so in their call.
    """
    given = {_argument(option, settings): getattr(settings, option) for option in _ARGUMENTS}
    if settings.kind == "image":
        given["num_frames"] = 1
    given["frame_rate"] = settings.fps
    given = {name: value for name, value in given.items() if value is not None}
    return {**{name: v for name, v in settings.call.items() if v is not None}, **given}


def _argument(option: str, settings: Settings) -> str:
    true = option == "guidance" and _TRUE_GUIDANCE in settings.call
    return _TRUE_GUIDANCE if true else _ARGUMENTS[option]


def _arguments(pipe: Any, settings: Settings, on_step: OnStep) -> dict[str, Any]:
    import torch

    accepted = parameters(pipe)
    found = {name: v for name, v in arguments_of(settings).items() if name in accepted}

    def stepped(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        total = getattr(pipeline, "num_timesteps", None) or settings.steps or step + 1
        on_step(step + 1, total)
        return tensors

    if "callback_on_step_end" in accepted:
        found["callback_on_step_end"] = stepped
    # drawn on the CPU, so that a seed means the same on every device
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    return {**found, "prompt": settings.prompt, "generator": generator, "output_type": "np"}


def _resolved(pipe: Any, settings: Settings, frames: Any) -> Settings:
    """The settings with the pipeline's own defaults filled in."""
    accepted = parameters(pipe)
    filled: dict[str, Any] = {}
    if not choice.upscales(settings.plan):
        filled = {"height": frames.shape[1], "width": frames.shape[2]}
    if settings.kind == "video":
        filled["frames"] = len(frames)
    for option in ("steps", "guidance"):
        argument = _argument(option, settings)
        parameter = accepted.get(argument)
        if getattr(settings, option) is None and parameter is not None:
            default = settings.call.get(argument, parameter.default)
            filled[option] = default if isinstance(default, (int, float)) else None
    return replace(settings, **filled)


def _with_nearest(message: str, settings: Settings) -> str:
    rule = re.search(r"divisible by (\d+)", message)
    if rule and settings.height and settings.width:
        try:
            check_size(settings, int(rule.group(1)), None)
        except InputError as error:
            return str(error)
    return message


def _first(target: Any, *names: str) -> int | None:
    values = (getattr(target, name, None) for name in names)
    return next((int(value) for value in values if isinstance(value, (int, float))), None)
