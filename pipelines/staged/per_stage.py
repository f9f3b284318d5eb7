"""PerStage: a condition of which every stage has a version of its own size."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor


class Stages(Protocol):
    """What a condition asks of the running call.

    looping: the loop runs. index: the present stage. last: the last stage's index. twin: (index) ->
    the last stage of the same size.
    """

    @property
    def looping(self) -> bool: ...
    @property
    def index(self) -> int: ...
    @property
    def last(self) -> int: ...
    def twin(self, index: int) -> int: ...


class PerStage(Tensor):
    """A tensor that has another size in every stage.

    A pipeline keeps its condition in a local variable of its call, out of reach. So it is handed
    this. Before the loop, what the pipeline computes with it is noted and is done for every stage;
    the values seen are those of the last stage, the full size. In the loop every operation takes
    the version of the present stage, and its result is a plain tensor.
    """

    _stages: Stages
    _full: Tensor
    _make: Callable[[int], Tensor]
    _made: dict[int, Tensor]

    @classmethod
    def of(cls, stages: Stages, full: Tensor, make: Callable[[int], Tensor]) -> "PerStage":
        """full: of the last stage. make: (index) -> the version of a stage of another size."""
        held = full.as_subclass(cls)
        held._stages, held._full, held._make, held._made = stages, full, make, {}
        return held

    def version(self, index: int) -> Tensor:
        """The plain tensor of a stage; made when first asked for."""
        index = self._stages.twin(index)
        if index == self._stages.last:
            return self._full
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stages = _stages_of([args, kwargs])
        assert stages is not None
        if stages.looping:
            return func(*at(args, stages.index), **at(kwargs, stages.index))
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            raise RuntimeError(f"{name} would change a condition in place, in one of its sizes "
                               "only: bottleneck needs an adapter for this version of diffusers")
        full = func(*at(args, stages.last), **at(kwargs, stages.last))
        return _spread(stages, full, lambda i: func(*at(args, i), **at(kwargs, i)))


def at(values: Any, index: int) -> Any:
    """The same values with every condition, also inside lists and dicts, in a stage's version."""
    if isinstance(values, PerStage):
        return values.version(index)
    if isinstance(values, Mapping):
        return {key: at(value, index) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(at(value, index) for value in values)
    return values


def hold(stages: Stages, versions: Mapping[int, Any]) -> Any:
    """One value for the versions of a result, by stage; each tensor in it becomes a PerStage."""
    return _spread(stages, versions[stages.last], lambda i: versions[i])


def _spread(stages: Stages, full: Any, make: Callable[[int], Any]) -> Any:
    if isinstance(full, Tensor):
        return PerStage.of(stages, full, make)
    if type(full) in (list, tuple):
        return type(full)(_spread(stages, part, lambda i, n=n: make(i)[n])
                          for n, part in enumerate(full))
    return full


def _stages_of(values: Any) -> Stages | None:
    if isinstance(values, PerStage):
        return values._stages
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return None
    return next((found for found in map(_stages_of, values) if found is not None), None)
