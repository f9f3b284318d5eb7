"""Method: what `enable_fastdiff` takes, and Host: what a method enters."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple
from weakref import ref

from torch import nn

from fastdiff.clock import StepClock
from fastdiff.report import Report

REGISTRY: dict[str, type["Method"]] = {}
KINDS = ("attention", "tokens", "sampling")


class Part(NamedTuple):
    """A denoiser and the family record that reads it."""

    model: nn.Module
    family: Any


@dataclass
class Host:
    """What a method enters: a pipeline, or a bare model.

    pipe: None for a bare model. models: denoisers by component name. fallback: (where, reason) of
    something that runs stock unasked; counted and logged once, an error in strict mode.
    """

    pipe: Any
    models: dict[str, Part]
    clock: StepClock
    report: Report
    strict: bool
    fallback: Callable[[str, str], None]


def held(pipe: Any) -> Callable[[], Any]:
    """A weak reference: what hangs on a model must not keep its pipeline alive."""
    try:
        return ref(pipe)
    except TypeError:  # a SimpleNamespace of a loop of one's own
        return lambda: pipe


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of making generation faster: frozen, plain data, found by its registered name.

    kind: "attention" (at most one at a time), "tokens", or "sampling" (at most one).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            REGISTRY[cls.name] = cls

    def attach(self, host: Host) -> Callable[[], None]:
        """Enter. Returns the function that takes everything out again, bit for bit.

        Raises ValueError where this method cannot work on the host; the host is then unchanged.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attach")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **dataclasses.asdict(self)}


def check(ok: bool, knob: str, value: Any, accepted: str) -> None:
    """Refuse a knob's value, saying what is accepted."""
    if not ok:
        raise ValueError(f"{knob}={value!r} is not possible: accepted is {accepted}")
