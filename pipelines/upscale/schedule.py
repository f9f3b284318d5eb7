"""The schedule of the second stage: the last part of a whole one."""

import math
from typing import Any

import torch

from fastdiff.pipelines.staged.noise import kind_of
from fastdiff.pipelines.staged.schedule import own_copy


def kept_steps(steps: int, strength: float) -> int:
    """Steps that are run out of `steps`: diffusers' own rule for strength."""
    return min(max(1, int(round(steps * strength, 6))), steps)


def check_shift(scheduler: Any, shift: float | None) -> None:
    """Refuse a scheduler that cannot be cut, or a shift that it does not have."""
    if kind_of(scheduler) != "flow" and shift is not None:
        raise ValueError(f"shift={shift:g} is for flow matching, and {type(scheduler).__name__} "
                         "here is none: leave shift out")


def rebuilt(scheduler: Any, shift: float | None) -> Any:
    """A stock copy of the user's scheduler, with another shift of its flow schedule.

    Built from its config, because the config of a living scheduler is frozen.
    """
    copied = own_copy(scheduler)
    if shift is None:
        return copied
    check_shift(copied, shift)
    if copied.config.get("use_dynamic_shifting"):
        # follows the size by itself; the given shift takes the place of what it would find
        return copied
    name = "flow_shift" if "flow_shift" in copied.config else "shift"
    return type(copied).from_config(copied.config, **{name: shift})


def shift_for(scheduler: Any, grown: float) -> float | None:
    """A flow schedule's own fixed shift, for sides `grown` times as long; None for others.

    Noise hides less of a larger picture: noise to signal grows with the side (arXiv 2403.03206).
    """
    fixed = kind_of(scheduler) == "flow" and not scheduler.config.get("use_dynamic_shifting")
    if not fixed:
        return None
    own = scheduler.config.get("flow_shift", scheduler.config.get("shift"))
    return None if own is None else float(own) * grown


def write(
    scheduler: Any, arguments: dict[str, Any], steps: int, kept: int, shift: float | None,
    grown: float = 1.0,
) -> None:
    """Set a schedule of `steps` on `scheduler`, a copy, and leave its last `kept` ones.

    arguments: of the pipeline's own set_timesteps call, by name; a pipeline that brings sigmas
    brings even ones. A scheduler that follows the size, with no shift given, gets that of the
    trained size times `grown`, the growth of the sides.
    """
    own = dict(arguments)
    if own.get("num_inference_steps") is not None:
        own["num_inference_steps"] = steps
    if own.get("sigmas") is not None:
        own["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    if own.get("mu") is not None:
        config = scheduler.config
        linear = config.get("time_shift_type", "exponential") == "linear"
        if shift is None:
            mu = _smaller(config, own["mu"], grown**2)
            shift = (mu if linear else math.exp(mu)) * grown
        own["mu"] = shift if linear else math.log(shift)
    scheduler.set_timesteps(**own)
    first = len(scheduler.timesteps) - kept
    scheduler.timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def _smaller(config: Any, mu: float, area: float) -> float:
    """The pipeline's shift for a picture of 1 / area the tokens: it lies on a line over them."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - least)
    tokens = least + (mu - low) / slope
    return low + slope * (tokens / area - least)
