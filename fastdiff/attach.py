"""Add the pipeline methods to diffusers when, and only when, diffusers itself is imported."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

# module that defines a pipeline base class -> the class
HOMES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


def enable_fastdiff(self, /, *methods, plan=None, strict=None, **options):
    """Make this pipeline faster; see `fastdiff.enable`. Returns the pipeline."""
    _api().enable(self, *methods, plan=plan, strict=strict, **options)
    return self


def disable_fastdiff(self):
    """Take FastDiff out again: stock, bit for bit. Returns the pipeline."""
    _api().disable(self)
    return self


def fastdiff(self):
    """What FastDiff does in this pipeline, and what happened in its last run. Print it."""
    return _api().handle_of(self)


def _api() -> Any:
    return importlib.import_module("fastdiff.api")


def _add_methods(cls: type) -> None:
    for name, member in (("enable_fastdiff", enable_fastdiff),
                         ("disable_fastdiff", disable_fastdiff),
                         ("fastdiff", property(fastdiff))):
        setattr(cls, name, member)


class _Loader(Loader):
    """The module's own loader, and then our methods."""

    def __init__(self, stock: Loader) -> None:
        self._stock = stock

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._stock.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._stock.exec_module(module)
        module.__spec__.loader = module.__loader__ = self._stock
        _add_methods(getattr(module, HOMES[module.__name__]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


class _Finder(MetaPathFinder):
    _busy = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in HOMES or self._busy:
            return None
        self._busy = True
        try:
            spec = find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def attach() -> None:
    """Idempotent; imports nothing."""
    for module, cls in HOMES.items():
        if module in sys.modules and hasattr(sys.modules[module], cls):
            _add_methods(getattr(sys.modules[module], cls))
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
