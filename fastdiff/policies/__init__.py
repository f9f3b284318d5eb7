"""Ways of choosing what to attend to: one file per method, found by its registered name."""

import importlib
import pkgutil

from fastdiff.method import REGISTRY
from fastdiff.policies.base import Context, Policy

__all__ = ["Context", "Policy", "methods"]


def methods() -> dict[str, type[Policy]]:
    """Every registered policy class by name; imports each file of this folder once."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found = {name: cls for name, cls in REGISTRY.items() if issubclass(cls, Policy)}
    return dict(sorted(found.items()))
