"""Turn: what the running forward of a denoiser does with each row of its batch."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# arguments of a denoiser that have no batch axis, though a size may happen to agree
_WITHOUT_BATCH = ("img_ids", "txt_ids", "image_rotary_emb", "rope_interpolation_scale")


class Turn(NamedTuple):
    """kind: "window" (windows alone), "guide" (both branches), "record" (the guide alone, to be
    kept), "reuse" (windows, guide as kept).

    rows: rows that the pipeline asked for. first: rows from here on are guided. On a guide turn
    the batch is [rows of the window branch, then one guide row for each guided one].
    """

    kind: str
    rows: int
    first: int = 0

    @property
    def guided(self) -> int:
        return self.rows - self.first

    @property
    def batch(self) -> int:
        return self.rows + self.guided if self.kind == "guide" else self.rows

    def extended(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward with the guide rows behind the rows that were asked for."""
        return self._each(arguments, lambda x: torch.cat([x, x[self.first :]]))

    def guides(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward of the guide rows alone."""
        return self._each(arguments, lambda x: x[self.first :])

    def _each(self, arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.rows:
                return change(value)
            if isinstance(value, dict):
                return self._each(value, change)
            if isinstance(value, (list, tuple)):
                return type(value)(changed(item) for item in value)
            return value

        return {name: value if name in _WITHOUT_BATCH else changed(value)
                for name, value in arguments.items()}

    def own(self, value: Any) -> Any:
        """The rows of a tensor that compute text attention themselves, out of the whole batch."""
        if self.kind == "record":
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self.own(item) for item in value)
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != self.batch:
            return value
        alone = value[: self.first]
        if self.kind != "guide":
            return alone
        return torch.cat([alone, value[self.rows :]]) if self.first else value[self.rows :]

    def spread(self, found: Tensor | None, guide: Tensor) -> Tensor:
        """The whole batch of a result, from that of the unguided rows and that of the guide."""
        parts = [] if found is None or not self.first else [found]
        times = 2 if self.kind == "guide" else 1
        return torch.cat([*parts, *[guide] * times]) if parts or times > 1 else guide


def batch_of(arguments: dict[str, Any]) -> int:
    """Rows of a denoiser's forward, by its arguments."""
    latents = arguments.get("hidden_states", arguments.get("sample"))
    if not isinstance(latents, Tensor):
        raise TypeError("this denoiser takes neither hidden_states nor sample as a tensor")
    return latents.shape[0]


def arguments_by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by the names that its class gives them."""
    names = [*inspect.signature(type(module).forward).parameters][1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
