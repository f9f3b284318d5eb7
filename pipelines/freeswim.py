"""FreeSwim: a model's own clip or picture, made anew at a size it was not trained for."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdiff.method import Host, Method, check
from fastdiff.pipelines.staged.call import wrap_call
from fastdiff.pipelines.staged.noise import kind_of
from fastdiff.pipelines.upscale.cache import PLACES
from fastdiff.pipelines.upscale.call import Upscale
from fastdiff.pipelines.upscale.dual import MODES, SLIDES
from fastdiff.pipelines.upscale.families import upscaling_of

__all__ = ["FreeSwim"]

# sqrt(log(2 n) / log n) for the n = 30 x 52 tokens of a Wan frame at 480 x 832
SCALE_MULT = 1.0461


@dataclass(frozen=True)
class FreeSwim(Method):
    """Video and pictures beyond the trained size, without training (arXiv 2511.14712).

    The pipeline's call makes a clip at the size of its own arguments, the trained one. It is
    resized, encoded, noised, and denoised again at `target`. There every query attends to a window
    as large as the trained picture, which keeps detail as it was trained; a second, dense branch
    of the same latent guides it: its text attention takes the place of the windows' own, so that
    the whole picture stays one. Only the window branch is the result.

    target: (height, width) in pixels, or words such as "1088x1920".
    mode: "cache": the dense branch runs every `interval` steps and its text attention is used again
        in between; the unconditional branch has windows alone. "nocache": it runs in every step and
        both branches, as first published; costs more than dense attention. "window" and "dense":
        one of the two paths alone, to compare with.
    interval: steps from one guide step to the next, counted in steps that are run.
    strength: share of the steps that the second stage runs; less stays nearer to the first clip.
    shift: of the second stage's flow schedule. None: 9 for Wan, as published; for others that of
        the trained size times the growth of the sides.
    scale_mult: factor on attention scores in the second stage, for more keys than in training.
    slide: "tile": neighbours in a tile share a window, and tiles need no mask inside; "token": the
        windows of the paper, each query its own, slower. "auto": tiles, unless a window is so small
        that sharing it would move it by an eighth and more.
    cache: where the guide's text attention is kept: device, host, device-8-bit, host-8-bit, or none
        (the guide runs in every step). auto takes the first with room.
    folder: where a run leaves what it has made, so that the same call goes on after it was killed.

    Cost of a step against dense, A of it attention and P the rest, windows a share r of A:
    nocache (1 + r) A + 2 P; cache (1 / (2 interval) + r) A + (1 + 1 / (2 interval)) P.
    """

    name: ClassVar[str] = "freeswim"
    summary: ClassVar[str] = "clips and pictures beyond the trained size, by windows and a guide"
    kind: ClassVar[str] = "sampling"

    target: tuple[int, int] | str | None = None
    mode: str = "cache"
    interval: int = 2
    strength: float = 0.7
    shift: float | None = None
    scale_mult: float = SCALE_MULT
    slide: str = "auto"
    cache: str = "auto"
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            object.__setattr__(self, "target", read_target(self.target))
        check(self.mode in MODES, "mode", self.mode, " or ".join(MODES))
        check(self.slide in SLIDES, "slide", self.slide, " or ".join(SLIDES))
        places = ("auto", *PLACES)
        check(self.cache in places, "cache", self.cache, " or ".join(places))
        check(isinstance(self.interval, int) and self.interval >= 1, "interval", self.interval,
              "1 or more steps")
        check(0 < self.strength <= 1, "strength", self.strength, "a number over 0, at most 1")
        check(self.shift is None or self.shift > 0, "shift", self.shift, "a number over 0")
        check(self.scale_mult > 0, "scale_mult", self.scale_mult, "a number over 0")

    def attach(self, host: Host) -> Callable[[], None]:
        pipe = host.pipe
        if pipe is None or not hasattr(pipe, "prepare_latents"):
            what = "a bare model" if pipe is None else type(pipe).__name__
            raise ValueError(f"freeswim works around the call of a diffusers pipeline, not of "
                             f"{what}")
        if self.target is None:
            raise ValueError("freeswim needs a target, such as target=(1088, 1920): height and "
                             "width in pixels")
        part = next(iter(host.models.values()))
        upscaling = upscaling_of(pipe, part.family)
        kind_of(pipe.scheduler)
        step = part.family.staging.cell(pipe) * part.family.staging.unit(part.model)
        check_target(self.target, step)

        @contextmanager
        def around(pipe: Any, asked: dict[str, Any]) -> Iterator[None]:
            models = {name: part for name, part in host.models.items()
                      if getattr(pipe, name, None) is not None}
            with ExitStack() as stack:
                Upscale(self, host, pipe, models, upscaling).begin(asked, stack)
                yield

        return wrap_call(pipe, around)


def read_target(given: Any) -> tuple[int, int]:
    """(height, width) from two numbers or from words such as "1088x1920"."""
    sides: Sequence[Any] = given
    if isinstance(given, str):
        sides = given.lower().replace(",", "x").split("x")
    try:
        height, width = (int(side) for side in sides)
        if min(height, width) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"target={given!r} is not possible: accepted is (height, width) in "
                         'pixels, or words such as "1088x1920"') from None
    return height, width


def check_target(target: tuple[int, int] | str, step: int) -> None:
    """ValueError with the nearest legal size where a side is no multiple of `step`."""
    height, width = read_target(target)
    if height % step == width % step == 0:
        return
    near = "x".join(str(max(1, math.floor(side / step + 0.5)) * step) for side in (height, width))
    raise ValueError(f"target={height}x{width} (height x width) is not possible: sides are "
                     f"multiples of {step}; the nearest is {near}")
