"""Family: how to read the token layout of one group of denoisers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.layout import TokenLayout

Arguments = Mapping[str, Any]
Reading = TokenLayout | tuple[TokenLayout, Tensor]


@dataclass(frozen=True)
class Family:
    """One group of denoisers that show their grid and their text in the same way.

    denoisers: class names. read: (module, arguments of forward by name) -> TokenLayout, or
    (TokenLayout, ids) when only position ids know the grid. site: class name of the submodule to
    read instead of the denoiser. skip: parts of module names whose attention is not over the grid.
    """

    name: str
    denoisers: tuple[str, ...]
    read: Callable[[nn.Module, Arguments], Reading]
    site: str | None = None
    skip: tuple[str, ...] = ("token_refiner", "context_refiner")


def text_tokens(arguments: Arguments) -> int:
    text = arguments.get("encoder_hidden_states")
    return 0 if text is None else text.shape[1]
