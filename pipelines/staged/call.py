"""Enter and leave one call of one pipeline; nothing is changed between calls."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import nn

AROUND = "_fastdiff_around_call"

# (pipeline, call arguments by name) -> a context manager that may change the arguments
Around = Callable[[Any, dict[str, Any]], Any]

_subclasses: dict[type, type] = {}


def wrap_call(pipe: Any, around: Around) -> Callable[[], None]:
    """Run every call of this pipeline inside `around`. Returns what undoes it.

    Python looks `__call__` up on the class, so the instance gets a subclass of the same name.
    """
    stock = type(pipe)
    pipe.__class__ = _subclass(stock)
    pipe.__dict__[AROUND] = around
    weak = ref(pipe)

    def undo() -> None:
        entered = weak()
        if entered is None:
            return
        entered.__dict__.pop(AROUND, None)
        if type(entered) is _subclasses[stock]:
            entered.__class__ = stock

    return undo


def _subclass(cls: type) -> type:
    if cls not in _subclasses:
        signature = inspect.signature(cls.__call__)

        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            around = self.__dict__.get(AROUND)
            if around is None:
                return cls.__call__(self, *args, **kwargs)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            with around(self, bound.arguments):
                return cls.__call__(*bound.args, **bound.kwargs)

        body = {"__call__": __call__, "__module__": cls.__module__,
                "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _subclasses[cls] = type(cls.__name__, (cls,), body)
    return _subclasses[cls]


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
