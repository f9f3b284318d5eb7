"""A scheduler that stands in for the user's during one call, and asks the run what to do."""

import functools
from typing import Any

RUN = "_fastdiff_run"
# what the run answers itself; everything else is the present stage's own scheduler
_TOLD_BY_THE_RUN = ("timesteps", "sigmas")

_subclasses: dict[type, type] = {}


def stand_in(scheduler: Any, run: Any) -> Any:
    """An object of the class of `scheduler`, a stock one.

    run: has `scheduler` (that of the present stage), `timesteps` and `sigmas` of the whole run
    (None before they are set), `set_timesteps` and `step`.
    """
    made = object.__new__(_subclass(type(scheduler)))
    object.__setattr__(made, RUN, run)
    return made


def _subclass(cls: type) -> type:
    """Same name, same signatures, so that pipelines which inspect them see no difference."""
    if cls not in _subclasses:

        @functools.wraps(cls.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, RUN).set_timesteps(args, kwargs)

        @functools.wraps(cls.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, RUN).step(args, kwargs)

        def __getattribute__(self, name: str) -> Any:
            if name in ("set_timesteps", "step") or name.startswith(("__", "_fastdiff")):
                return object.__getattribute__(self, name)
            run = object.__getattribute__(self, RUN)
            if name in _TOLD_BY_THE_RUN and getattr(run, name) is not None:
                return getattr(run, name)
            return getattr(run.scheduler, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(getattr(self, RUN).scheduler, name, value)

        body = {"set_timesteps": set_timesteps, "step": step, "__setattr__": __setattr__,
                "__getattribute__": __getattribute__, "__module__": cls.__module__,
                "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _subclasses[cls] = type(cls.__name__, (cls,), body)
    return _subclasses[cls]
