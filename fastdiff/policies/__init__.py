"""Ways of choosing what to attend to: one file per method, found by its registered name."""

import importlib
import pkgutil

from fastdiff.policies.base import REGISTRY, Context, Policy

__all__ = ["Context", "Policy", "methods"]


def methods() -> dict[str, type[Policy]]:
    """Every registered policy class by name; imports each file of this folder once."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(REGISTRY.items()))
