"""Drive a StepClock from a diffusers scheduler, by swapping the class of that one instance."""

import functools
import inspect
from typing import Any

import torch

from fastdiff.clock import StepClock

ORIGINAL = "_fastdiff_original"
CLOCK = "_fastdiff_clock"

_subclasses: dict[type, type] = {}


def _subclass(cls: type) -> type:
    """A subclass with the same name and signatures that also tells the clock."""
    if cls not in _subclasses:

        signature = inspect.signature(cls.step)

        @functools.wraps(cls.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
            result = cls.set_timesteps(self, *args, **kwargs)
            if armed(self):
                getattr(self, CLOCK).begin(len(self.timesteps))
            return result

        @functools.wraps(cls.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = cls.step(self, *args, **kwargs)
            if armed(self):
                clock = getattr(self, CLOCK)
                if clock.step == 0:
                    timestep = signature.bind(self, *args, **kwargs).arguments.get("timestep")
                    clock.steps = len(self.timesteps) - _skipped(self, timestep)
                clock.advance()
            return result

        body = {"set_timesteps": set_timesteps, "step": step, "__module__": cls.__module__,
                "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, ORIGINAL: cls}
        _subclasses[cls] = type(cls.__name__, (cls,), body)
    return _subclasses[cls]


def _skipped(scheduler: Any, timestep: Any) -> int:
    """Timesteps of the schedule before the one that a run began with: image to image skips some."""
    index = getattr(scheduler, "step_index", None)
    if index is not None:
        return max(0, index - 1)
    if timestep is None:
        return 0
    found = (torch.as_tensor(scheduler.timesteps) == timestep).nonzero()
    return int(found[0]) if len(found) else 0


def armed(scheduler: Any) -> bool:
    # the class alone is not enough: type(scheduler).from_config(...) makes one without a clock
    return CLOCK in getattr(scheduler, "__dict__", {})


def clock_of(scheduler: Any) -> StepClock | None:
    """The clock that this scheduler drives."""
    return getattr(scheduler, "__dict__", {}).get(CLOCK)


def arm_scheduler(scheduler: Any, clock: StepClock) -> None:
    """Let this scheduler instance drive `clock`; isinstance and saved names stay as they were."""
    if not hasattr(type(scheduler), ORIGINAL):
        scheduler.__class__ = _subclass(type(scheduler))
    setattr(scheduler, CLOCK, clock)


def disarm_scheduler(scheduler: Any) -> None:
    if hasattr(type(scheduler), ORIGINAL):
        scheduler.__class__ = getattr(type(scheduler), ORIGINAL)
        scheduler.__dict__.pop(CLOCK, None)
