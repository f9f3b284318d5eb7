"""Family: how to read the token layout of one group of denoisers, and how to change their size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


def accept(pipe: Any, call: dict[str, Any]) -> None:
    """Any call."""


@dataclass(frozen=True)
class Condition:
    """How a pipeline makes the picture-sized condition that its loop joins with the latents.

    pictures, masks: its processors whose `preprocess` resizes the user's picture or mask. remade:
    its functions that encode them, called once a size. models: other components that take a
    condition. own_size: its pictures have a size of their own, which follows the scale. check:
    (pipe, arguments of the call by name) raises a ValueError where it cannot run in stages, and may
    fill arguments in.
    """

    pictures: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    own_size: bool = False
    check: Callable[[Any, dict[str, Any]], None] = accept


@dataclass(frozen=True)
class Staging:
    """What sampling at several sizes must know of a family.

    pipelines: class names whose call can run in stages. conditions: the same for pipelines with a
    condition. others: why other pipelines of this family cannot. fixed: (model) -> why these
    weights cannot change size, None where they can. cell: (pipe) -> pixels of a latent cell. unit:
    (model) -> latent cells that a side is a multiple of. whole: the pipeline rounds the asked size
    down to whole units. trained: (model) -> pixels (height x width) of the smallest size that the
    weights were trained at, None where it is not known. unpack, pack: (model, latents, size) ->
    latents as [..., rows, columns], and back. rebind: (pipe, size, arguments) -> those arguments of
    the denoiser's forward that depend on the size and do not fit `size` yet, made for it.
    """

    pipelines: tuple[str, ...]
    cell: Callable[[Any], int]
    unit: Callable[[Any], int]
    trained: Callable[[Any], int | None]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    others: str = "its loop was not examined"
    fixed: Callable[[Any], str | None] = lambda model: None
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
