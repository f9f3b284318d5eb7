"""Shadow classes: a diffusers attention processor whose attention call is ours, all else stock.

A processor keeps its own code object: its class is swapped for a subclass whose `__call__` is
that code bound to a copy of the module's globals, in which only the attention function is
replaced. RoPE, norms, LoRA and adapters inside the processor stay stock.
"""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

ORIGINAL = "_fastdiff_original"
DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"


def supported(processor: Any) -> bool:
    """Whether this processor calls attention by a name that FastDiff can take over."""
    return _entry(type(processor)) is not None


def _entry(cls: type) -> str | None:
    call = inspect.getattr_static(cls, "__call__", None)
    if not isinstance(call, types.FunctionType):
        return None
    names = call.__code__.co_names
    for wanted in (DISPATCH, SDPA):
        if wanted in names and ("F" if wanted == SDPA else wanted) in call.__globals__:
            return wanted
    return None


def _shadow_module(module_name: str, changes: dict[str, Any]) -> types.ModuleType:
    name = f"fastdiff._shadow.{module_name}"
    shadow = sys.modules.get(name)
    if shadow is None:
        # registered, because Dynamo finds a function's globals by importing its module
        shadow = types.ModuleType(name)
        shadow.__dict__.update(vars(sys.modules[module_name]))
        shadow.__dict__.update(changes, __name__=name)
        sys.modules[name] = shadow
    return shadow


_subclasses: dict[type, type] = {}


def _subclass(cls: type, stand_ins: Mapping[str, Callable]) -> type | None:
    """A subclass of this processor class whose attention call is ours; None if it has none."""
    if cls in _subclasses:
        return _subclasses[cls]
    entry = _entry(cls)
    if entry is None:
        return None
    call = inspect.getattr_static(cls, "__call__")
    changes: dict[str, Any] = {}
    if DISPATCH in call.__globals__:
        changes[DISPATCH] = stand_ins[DISPATCH]
    if "F" in call.__globals__:
        changes["F"] = _shadow_module("torch.nn.functional", {SDPA: stand_ins[SDPA]})
    shadow = _shadow_module(call.__module__, changes)
    ours = types.FunctionType(
        call.__code__, shadow.__dict__, call.__name__, call.__defaults__, call.__closure__
    )
    ours.__kwdefaults__ = call.__kwdefaults__
    ours.__annotations__ = call.__annotations__
    ours.__qualname__ = call.__qualname__
    body = {"__call__": ours, "__module__": cls.__module__, "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__, ORIGINAL: cls}
    subclass = type(cls.__name__, (cls,), body)
    _register_like(subclass, cls)
    _subclasses[cls] = subclass
    return subclass


def _register_like(subclass: type, cls: type) -> None:
    """diffusers' registry looks processors up by exact class (layer skipping reads it)."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(cls)
    except ValueError:
        return
    AttentionProcessorRegistry.register(subclass, metadata)


def swap_class(processor: Any, stand_ins: Mapping[str, Callable]) -> bool:
    """Let this instance call `stand_ins`; False if it calls neither function. Safe to repeat."""
    if hasattr(type(processor), ORIGINAL):
        return True
    subclass = _subclass(type(processor), stand_ins)
    if subclass is None:
        return False
    processor.__class__ = subclass
    return True


def restore_class(processor: Any) -> None:
    """Give this instance its own class back."""
    original = getattr(type(processor), ORIGINAL, None)
    if original is not None:
        processor.__class__ = original
