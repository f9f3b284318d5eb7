"""Many jobs over one or several GPUs, without losing work. `from fastdiff.batch import run`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.batch.api import plan, run
    from fastdiff.batch.watch import Gain, Outcome

__all__ = ["Gain", "Outcome", "plan", "run"]
_HOME = {"run": "api", "plan": "api", "Gain": "watch", "Outcome": "watch"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdiff.batch' has no attribute {name!r}")
    return getattr(import_module(f"fastdiff.batch.{_HOME[name]}"), name)
