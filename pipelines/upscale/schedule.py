"""The schedule of the second stage: the last part of a whole one."""

import math
from typing import Any

import torch

from fastdiff.pipelines.staged.noise import kind_of
from fastdiff.pipelines.staged.schedule import own_copy


def kept_steps(steps: int, strength: float) -> int:
    """Steps that are run out of `steps`: diffusers' own rule for strength."""
    return min(max(1, int(round(steps * strength, 6))), steps)


def rebuilt(scheduler: Any, shift: float | None) -> Any:
    """A stock copy of the user's scheduler, with another shift of its flow schedule.

    Built from its config, because the config of a living scheduler is frozen.
    """
    copied = own_copy(scheduler)
    if shift is None:
        return copied
    if kind_of(copied) != "flow":
        raise ValueError(f"shift={shift:g} is for flow matching, and {type(copied).__name__} here "
                         "is none: leave shift out")
    if copied.config.get("use_dynamic_shifting"):
        # follows the size by itself; the given shift takes the place of what it would find
        return copied
    name = "flow_shift" if "flow_shift" in copied.config else "shift"
    return type(copied).from_config(copied.config, **{name: shift})


def write(
    scheduler: Any, arguments: dict[str, Any], steps: int, kept: int, shift: float | None
) -> None:
    """Set a schedule of `steps` on `scheduler`, a copy, and leave its last `kept` ones.

    arguments: of the pipeline's own set_timesteps call, by name; a pipeline that brings sigmas
    brings even ones.
    """
    own = dict(arguments)
    if own.get("num_inference_steps") is not None:
        own["num_inference_steps"] = steps
    if own.get("sigmas") is not None:
        own["sigmas"] = torch.linspace(1, 1 / steps, steps).tolist()
    if shift is not None and scheduler.config.get("use_dynamic_shifting"):
        linear = scheduler.config.get("time_shift_type", "exponential") == "linear"
        own["mu"] = shift if linear else math.log(shift)
    scheduler.set_timesteps(**own)
    first = len(scheduler.timesteps) - kept
    scheduler.timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
