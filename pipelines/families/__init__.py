"""Model families: one file each, found by the class name of the denoiser."""

import importlib
import pkgutil
from functools import cache

from torch import nn

from fastdiff.pipelines.families.base import Family

__all__ = ["Family", "families", "family_of"]


@cache
def families() -> tuple[Family, ...]:
    """Every family record of this folder."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        record = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if isinstance(record, Family):
            found.append(record)
    return tuple(found)


def family_of(model: nn.Module) -> Family | None:
    """The record for this denoiser: by its class name, or by a base class's; else None."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        for family in families():
            if name in family.denoisers:
                return family
    return None
