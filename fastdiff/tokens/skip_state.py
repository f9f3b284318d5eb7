"""How large each token's attention output was when it was last computed, per guidance branch."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastdiff.clock import StepClock
from fastdiff.tokens.rank import parted

_numbers = itertools.count()
_states: WeakValueDictionary[int, "Skips"] = WeakValueDictionary()


class Skips:
    """The memory of one attention module. number: a tensor, so that modules share a graph."""

    def __init__(self, clock: StepClock) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number, dtype=torch.int64)
        self.sizes: dict[Any, Tensor] = {}
        self._clock = clock
        self._seen: tuple[int, int | None] | None = None
        self._call = 0
        clock.on_begin(self.sizes.clear)
        _states[number] = self

    def __deepcopy__(self, memo: dict) -> "Skips":
        return self

    def branch(self) -> Any:
        """The pipeline's name for the guidance branch, else the number of the call in this step."""
        now = (self._clock.run, self._clock.step)
        self._call = self._call + 1 if self._seen == now else 0
        self._seen = now
        return self._call if self._clock.branch is None else self._clock.branch


@torch.library.custom_op("fastdiff::note_output", mutates_args=())
def note_output(output: Tensor, number: Tensor) -> Tensor:
    """Remember how large output [B, S, H, D] is for every token; returns it, copied."""
    state = _states[int(number)]
    state.sizes[state.branch()] = output.flatten(2).norm(dim=-1, dtype=torch.float32)
    return output.clone()


@note_output.register_fake
def _(output, number):
    return torch.empty_like(output)


@torch.library.custom_op("fastdiff::choose_queries", mutates_args=())
def choose_queries(
    query: Tensor, number: Tensor, before: int, after: int, count: int
) -> tuple[Tensor, Tensor]:
    """Which of the queries [B, S, H, D] attend, int64 [B, count], and the others, both ascending.

    The first `before` and the last `after` always attend. With nothing noted for this branch and
    shape, the first tokens do.
    """
    state = _states[int(number)]
    batch, tokens = query.shape[:2]
    sizes = state.sizes.get(state.branch())
    if sizes is None or sizes.shape != (batch, tokens):
        sizes = query.new_zeros((batch, tokens), dtype=torch.float32)
    sizes = sizes.clone()
    sizes[:, :before] = torch.inf
    sizes[:, tokens - after:] = torch.inf
    return parted(sizes, count)


@choose_queries.register_fake
def _(query, number, before, after, count):
    batch, tokens = query.shape[:2]
    return (query.new_empty((batch, count), dtype=torch.int64),
            query.new_empty((batch, tokens - count), dtype=torch.int64))
