"""FastDiff: faster diffusers pipelines by sparse attention. One line: pipe.enable_fastdiff()."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdiff.attach import attach

if TYPE_CHECKING:
    from fastdiff.api import disable, enable, find_denoisers
    from fastdiff.method import Method
    from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage
    from fastdiff.pipelines.freeswim import FreeSwim
    from fastdiff.policies import Policy
    from fastdiff.policies.bands import Bands
    from fastdiff.policies.neighborhood import Neighborhood
    from fastdiff.policies.radial import Radial
    from fastdiff.policies.random_blocks import RandomBlocks
    from fastdiff.policies.sparse_vdit import SparseVDiT
    from fastdiff.policies.tile_sparse import TileSparse
    from fastdiff.policies.top_p import TopP
    from fastdiff.policies.vmoba import VMoBA
    from fastdiff.tokens.at_edm import AtEdm
    from fastdiff.tokens.kv_downsample import KVDownsample
    from fastdiff.tokens.linfusion import LinFusion
    from fastdiff.tokens.query_skip import QuerySkip
    from fastdiff.tokens.tome import ToMe
    from fastdiff.tokens.zero_tprune import ZeroTPrune
    from fastdiff.upscale import upscale_video

__version__ = "0.1.0"
__all__ = [
    "AtEdm", "Bands", "BottleneckSampling", "FreeSwim", "KVDownsample", "LinFusion", "Method",
    "Neighborhood", "Policy", "QuerySkip", "Radial", "RandomBlocks", "SparseVDiT", "Stage",
    "TileSparse", "ToMe", "TopP", "VMoBA", "ZeroTPrune", "disable", "enable", "find_denoisers",
    "upscale_video",
]

_HOME = {
    "enable": "api", "disable": "api", "find_denoisers": "api",
    "Method": "method", "Policy": "policies", "upscale_video": "upscale",
    "Bands": "policies.bands", "Neighborhood": "policies.neighborhood",
    "Radial": "policies.radial", "RandomBlocks": "policies.random_blocks",
    "SparseVDiT": "policies.sparse_vdit", "TileSparse": "policies.tile_sparse",
    "TopP": "policies.top_p", "VMoBA": "policies.vmoba",
    "AtEdm": "tokens.at_edm", "KVDownsample": "tokens.kv_downsample",
    "LinFusion": "tokens.linfusion", "QuerySkip": "tokens.query_skip", "ToMe": "tokens.tome",
    "ZeroTPrune": "tokens.zero_tprune",
    "BottleneckSampling": "pipelines.bottleneck", "Stage": "pipelines.bottleneck",
    "FreeSwim": "pipelines.freeswim",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(import_module(f"fastdiff.{_HOME[name]}"), name)


attach()
