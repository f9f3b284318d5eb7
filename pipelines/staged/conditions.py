"""Make a pipeline's condition anew for the size of every stage, by the pipeline's own functions.

Pictures and masks are resized from what the pipeline's processors make of the user's at full size,
and its functions that encode them are called once a size. So the last stage has exactly what stock
has, and a low stage what a stock call with a smaller picture has. Latents of a condition are never
resized: they are encoded again.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.pipelines.families.base import Condition, Size
from fastdiff.pipelines.staged.call import attributes
from fastdiff.pipelines.staged.per_stage import PerStage, Stages, at
from fastdiff.pipelines.staged.transition import resize

# (stage, height, width of the whole picture) -> that of the stage
SizeOf = Callable[[int, int, int], Size]


@contextmanager
def pictures_held(
    pipe: Any, condition: Condition, stages: Stages, size_of: SizeOf
) -> Iterator[None]:
    """For one call: what the processors of `pipe` make of the user's pictures has every size."""
    with ExitStack() as stack:
        for names, smaller in ((condition.pictures, smaller_picture), (condition.masks, cover)):
            for processor in (getattr(pipe, name) for name in names):
                made = _preprocess(processor.preprocess, stages, size_of, smaller)
                stack.enter_context(attributes(processor, preprocess=made))
        yield


def _preprocess(
    stock: Callable[..., Tensor], stages: Stages, size_of: SizeOf, smaller: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def preprocess(*args: Any, **kwargs: Any) -> Tensor:
        full = stock(*args, **kwargs)

        def make(index: int) -> Tensor:
            size = size_of(index, *full.shape[-2:])
            return smaller(full, size.height, size.width)

        return PerStage.of(stages, full, make)

    return preprocess


def once_a_size(
    stages: Stages, sizes: list[Size], first: int, stock: Callable[..., Any],
    arguments: inspect.BoundArguments,
) -> dict[int, Any]:
    """Results of `stock` for the size of every stage, by the last stage of that size.

    first: the stage whose call draws from the generator of the arguments. The other calls draw the
    same from a copy of it, so that what is drawn later is as in stock.
    """
    given = dict(arguments.arguments)
    copied = {"generator": _copy(given["generator"])} if "generator" in given else {}

    def call(index: int, changes: dict[str, Any]) -> Any:
        size = sizes[index]
        # the last stage keeps the numbers of the call, which may be no whole number of cells
        shape = {} if index == stages.last else {"height": size.height, "width": size.width}
        arguments.arguments.update(at(given, index) | shape | changes)
        return stock(*arguments.args, **arguments.kwargs)

    first = stages.twin(first)
    made = {first: call(first, {})}
    for index in sorted({stages.twin(i) for i in range(len(sizes))} - {first}):
        own = {"generator": _copy(copied["generator"])} if copied else {}
        fresh = {"latents": None} if "latents" in given else {}
        with torch.random.fork_rng(_cuda(given.get("device"))):
            made[index] = call(index, own | fresh)
    return made


def smaller_picture(picture: Tensor, height: int, width: int) -> Tensor:
    """[..., height, width], without aliasing and within the picture's own range."""
    made = resize(picture, height, width, "bicubic").to(picture.dtype)
    return made.clamp(picture.min(), picture.max())


def cover(mask: Tensor, height: int, width: int) -> Tensor:
    """A smaller mask: every cell that the mask touches. A thin line never gets lost."""
    return F.adaptive_max_pool2d(mask.float(), (height, width)).to(mask.dtype)


def _copy(generator: Any) -> Any:
    if isinstance(generator, list):
        return [_copy(one) for one in generator]
    if generator is None:
        return None
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def _cuda(device: Any) -> list[torch.device]:
    found = torch.device(device or "cpu")
    return [found] if found.type == "cuda" else []
