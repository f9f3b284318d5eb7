"""FastDiff: faster diffusers pipelines by sparse attention. One line: pipe.enable_fastdiff()."""

from importlib import import_module
from typing import Any

from fastdiff.attach import attach

__version__ = "0.1.0"
__all__ = ["Policy", "TileSparse", "disable", "enable", "find_denoisers"]

_HOME = {
    "enable": "api", "disable": "api", "find_denoisers": "api",
    "Policy": "policies", "TileSparse": "policies.tile_sparse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(import_module(f"fastdiff.{_HOME[name]}"), name)


attach()
