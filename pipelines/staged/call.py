"""Enter and leave one call of one pipeline; nothing is changed between calls."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import nn

AROUND = "_fastdiff_around_call"
# set on the pipeline during a call: () -> whether the loop may stop where it is
MAY_STOP = "_fastdiff_may_stop"

# (pipeline, call arguments by name) -> a context manager that may change the arguments
Around = Callable[[Any, dict[str, Any]], Any]

_subclasses: dict[type, type] = {}


def wrap_call(pipe: Any, around: Around) -> Callable[[], None]:
    """Run every call of this pipeline inside `around`. Returns what undoes it.

    Python looks `__call__` up on the class, so the instance gets a subclass of the same name.
    """
    pipe.__class__ = _subclass(type(pipe))
    pipe.__dict__[AROUND] = around
    weak = ref(pipe)

    def undo() -> None:
        entered = weak()
        if entered is not None:
            unwrap_call(entered)

    return undo


def unwrap_call(pipe: Any) -> None:
    """Let calls of this pipeline be stock again: the one that was wrapped, or a copy of it."""
    getattr(pipe, "__dict__", {}).pop(AROUND, None)
    stock = next((cls for cls, made in _subclasses.items() if made is type(pipe)), None)
    if stock is not None:
        pipe.__class__ = stock


def _subclass(cls: type) -> type:
    if cls not in _subclasses:
        signature = inspect.signature(cls.__call__)

        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            around = self.__dict__.get(AROUND)
            if around is None:
                return cls.__call__(self, *args, **kwargs)
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                return cls.__call__(self, *args, **kwargs)  # which raises in stock's words
            bound.apply_defaults()
            with around(self, bound.arguments):
                return cls.__call__(*bound.args, **bound.kwargs)

        body: dict[str, Any] = {
                "__call__": __call__, "__module__": cls.__module__,
                "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        if isinstance(getattr(cls, "interrupt", None), property):
            body["interrupt"] = property(_interrupt)
        _subclasses[cls] = type(cls.__name__, (cls,), body)
    return _subclasses[cls]


def _interrupt(self: Any) -> bool:
    """What a loop asks before every step, and then leaves its latents as they are."""
    may_stop = self.__dict__.get(MAY_STOP)
    return self._interrupt and (may_stop is None or may_stop())


@contextmanager
def attributes(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of this instance, and put back what was there."""
    # not through setattr: a pipeline writes its components into its config there
    found, missing = vars(target), object()
    before = {name: found.get(name, missing) for name in values}
    found.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if found.get(name, missing) is not values[name]:
                continue  # set anew since, by somebody else
            if value is missing:
                found.pop(name, None)
            else:
                found[name] = value


@contextmanager
def arguments_changed(
    model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[None]:
    """Let `change` give keyword arguments of every forward of `model`, outside compiled code.

    model: as the pipeline holds it. Runs before other hooks, so that they see what is changed.
    """
    compiled = model.__dict__.get("_compiled_call_impl")
    if compiled is not None:
        # model.compile() traces hooks; this stays outside of the traced call
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **{**kwargs, **change(kwargs)})

        with attributes(model, _compiled_call_impl=call):
            yield
        return

    def before_forward(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **change(kwargs)}

    hook = model.register_forward_pre_hook(before_forward, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
