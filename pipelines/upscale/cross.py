"""Cross-attention that takes the guide branch's answer: which word each place looks at."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastdiff.pipelines.staged.call import attributes
from fastdiff.pipelines.upscale.cache import GuideCache
from fastdiff.pipelines.upscale.turn import Turn


class Cross:
    """One cross-attention module to text.

    Without picture tokens its whole output is overridden, after the output projection, so that a
    step which takes the kept one has no query to project. With picture tokens (Wan I2V) these keep
    each row's own query, are added before the projection, and so the text part is overridden there.
    """

    def __init__(
        self, module: Any, turn: Callable[[], Turn | None], cache: GuideCache, layers: int
    ) -> None:
        self.module = module
        self.pictures = getattr(module, "add_k_proj", None) is not None
        self._turn = turn
        self._cache = cache
        self._layers = layers
        self._call = 0

    @property
    def key(self) -> int:
        return id(self.module)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Take over the module's forward; what accelerate put there stays under it."""
        stock = self.module.forward

        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            turn = self._turn()
            self._call = 0
            if turn is None or turn.kind == "window" or self.pictures:
                return stock(*args, **kwargs)
            return self._overridden(turn, stock, args, kwargs)

        with attributes(self.module, forward=forward):
            yield

    def _overridden(
        self, turn: Turn, compute: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        """What `compute` makes of all rows, with the guide's result in those that are guided."""
        out = None
        hidden = args[0] if args else kwargs["hidden_states"]
        if turn.kind != "reuse" or turn.first:
            out = compute(*turn.own(args), **{name: turn.own(x) for name, x in kwargs.items()})
        if turn.kind == "reuse":
            (guide,) = self._cache.get(self.key, hidden.device)
        else:
            assert out is not None
            guide = self._keep(out[turn.first :])
        return turn.spread(None if out is None else out[: turn.first], guide)

    def stage(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, scale: float | None,
    ) -> Tensor:
        """Around the attention calls of a module with picture tokens: these come first."""
        turn = self._turn()
        self._call += 1
        if turn is None or turn.kind == "window" or self._call == 1:
            return attend(query, key, value, mask)
        return self._overridden(turn, attend, (query, key, value, mask), {})

    def _keep(self, guide: Tensor) -> Tensor:
        self._cache.settle((guide,), self._layers)
        self._cache.put(self.key, (guide,))
        return guide


def cross_modules(model: nn.Module, name: str) -> list[Any]:
    """The cross-attention modules of a denoiser, whose names end in `name`."""
    return [module for path, module in model.named_modules()
            if path.rpartition(".")[2] == name and hasattr(module, "processor")]
