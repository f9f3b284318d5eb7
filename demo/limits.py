"""Limits: what one visitor may ask of the machine, checked on the server for every request."""

from dataclasses import dataclass

from fastdiff.cli.errors import InputError
from fastdiff.models import Defaults

SIDE, FRAMES = 1024, 129


@dataclass(frozen=True)
class Limits:
    """Bounds of a request and of the server.

    side: pixels of the longer side. steps, frames, prompt: most of each (prompt in characters).
    queue: jobs that wait or run. per_user: of them, of one browser page. results: finished results
        kept on disk. batch: prompts of one batch. seconds: time a job may run.
    """

    side: int = SIDE
    steps: int = 100
    frames: int = FRAMES
    prompt: int = 2000
    queue: int = 64
    per_user: int = 2
    results: int = 200
    batch: int = 32
    seconds: float = 1800.0

    @staticmethod
    def of(best: Defaults) -> "Limits":
        """Twice the size that a model makes best; a general bound where that is not known."""
        side = 2 * max(best.height or SIDE // 2, best.width or SIDE // 2)
        frames = 2 * best.frames - 1 if best.frames else FRAMES
        return Limits(side=side, frames=frames)

    def check(self, name: str, value: int | None, least: int, most: int) -> int | None:
        """`value`, when it lies in the bounds or is None; else a sentence."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(f"{name} {value!r} is not possible here: accepted is "
                             f"{least} to {most}")
        return value
