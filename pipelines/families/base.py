"""Family: how to read the token layout of one group of denoisers, and how to change their size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.layout import TokenLayout

Arguments = Mapping[str, Any]
Reading = TokenLayout | tuple[TokenLayout, Tensor]


class Size(NamedTuple):
    """A picture's size: height and width in pixels, rows and columns in latent cells."""

    height: int
    width: int
    rows: int
    columns: int


def as_they_are(model: Any, latents: Tensor, size: Size) -> Tensor:
    return latents


@dataclass(frozen=True)
class Staging:
    """What sampling at several sizes must know of a family.

    pipelines: class names whose call can run in stages. others: why other pipelines of this family
    cannot. cell: (pipe) -> pixels of a latent cell. unit: (model) -> latent cells that a side is a
    multiple of. whole: the pipeline rounds the asked size down to whole units. trained: (model) ->
    pixels (height x width) of the smallest size that the weights were trained at, None where it is
    not known. unpack, pack: (model, latents, size) -> latents as [..., rows, columns], and back.
    rebind: (pipe, size, arguments) -> those arguments of the denoiser's forward that depend on the
    size, made for `size`.
    """

    pipelines: tuple[str, ...]
    cell: Callable[[Any], int]
    unit: Callable[[Any], int]
    trained: Callable[[Any], int | None]
    others: str = "its loop was not examined"
    whole: bool = False
    unpack: Callable[[Any, Tensor, Size], Tensor] = as_they_are
    pack: Callable[[Any, Tensor, Size], Tensor] = as_they_are
    rebind: Callable[[Any, Size, Arguments], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Family:
    """One group of denoisers that show their grid and their text in the same way.

    denoisers: class names. read: (module, arguments of forward by name) -> TokenLayout, or
    (TokenLayout, ids) when only position ids know the grid. site: class name of the submodule to
    read instead of the denoiser. skip: parts of module names whose attention is not over the grid.
    staging: None where sampling cannot change the size.
    """

    name: str
    denoisers: tuple[str, ...]
    read: Callable[[Any, Arguments], Reading | None]
    site: str | None = None
    skip: tuple[str, ...] = ("token_refiner", "context_refiner")
    staging: Staging | None = None


def text_tokens(arguments: Arguments) -> int:
    text = arguments.get("encoder_hidden_states")
    return 0 if text is None else text.shape[1]
