"""FastDiff: faster diffusers pipelines by sparse attention. One line: pipe.enable_fastdiff()."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdiff.attach import attach

if TYPE_CHECKING:
    from fastdiff.api import disable, enable, find_denoisers
    from fastdiff.method import Method
    from fastdiff.policies import Policy
    from fastdiff.policies.tile_sparse import TileSparse
    from fastdiff.upscale import upscale_video

__version__ = "0.1.0"
__all__ = ["Method", "Policy", "TileSparse", "disable", "enable", "find_denoisers",
           "upscale_video"]

_HOME = {
    "enable": "api", "disable": "api", "find_denoisers": "api",
    "Method": "method", "Policy": "policies", "TileSparse": "policies.tile_sparse",
    "upscale_video": "upscale",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(import_module(f"fastdiff.{_HOME[name]}"), name)


attach()
