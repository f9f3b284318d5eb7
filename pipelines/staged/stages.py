"""Stage: what is asked of one part of the schedule, and the presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdiff.method import check
from fastdiff.pipelines.staged.noise import ratio_of
from fastdiff.pipelines.staged.schedule import Span

TRANSITIONS = ("restart", "continue", "matched-noise")


@dataclass(frozen=True)
class Stage:
    """One part of the schedule at one size.

    scale: side of the picture over the side that the call asks for.
    steps: evaluations; an int counts them, a float is a fraction of the call's steps.
    sigma_start: noise share noise / (signal + noise) at the first evaluation, over (0, 1]. For
        flow matching this is sigma; elsewhere the level of the same signal-to-noise ratio.
    shift: factor on noise to signal that spaces the evaluations; None is the scheduler's own, for
        the size of this stage.
    """

    scale: float = 1.0
    steps: int | float = 1.0
    sigma_start: float = 1.0
    shift: float | None = None

    def __post_init__(self) -> None:
        check(0 < self.scale <= 1, "scale", self.scale, "a number over 0, at most 1")
        fraction = isinstance(self.steps, float)
        check(not fraction or 0 < self.steps <= 1, "steps", self.steps,
              "a number of steps (int), or a fraction over 0.0, at most 1.0")
        check(self.steps > 0, "steps", self.steps, "1 or more steps")
        check(0 < self.sigma_start <= 1, "sigma_start", self.sigma_start,
              "a noise share over 0, at most 1")
        check(self.shift is None or self.shift > 0, "shift", self.shift, "a number over 0")

    def count(self, asked: int) -> int:
        """Evaluations in a call of `asked` steps."""
        if isinstance(self.steps, float):
            return max(1, round(self.steps * asked))
        return self.steps


@dataclass(frozen=True)
class Preset:
    """Stages under a name.

    low: scales of the low stage, the first one that the model was trained at is taken.
    shifts: whether the stages' shifts are for flow matching only.
    """

    stages: tuple[Stage, ...]
    transition: str = "restart"
    low: tuple[float, ...] = (0.5, 0.75)


PRESETS: dict[str, Preset] = {
    "balanced": Preset((
        Stage(1.0, 0.16, 1.0), Stage(0.5, 0.32, 0.93), Stage(1.0, 0.24, 0.75),
    ), transition="continue"),
    # the published reading of the paper's FLUX setting: 4, 13 and 8 of 50 steps
    "fast": Preset((
        Stage(1.0, 0.08, 1.0, 9.0), Stage(0.5, 0.26, 0.96, 6.0), Stage(1.0, 0.16, 0.931, 9.0),
    )),
    "video": Preset((
        Stage(1.0, 0.2, 1.0), Stage(0.5, 0.5, 0.96), Stage(1.0, 0.3, 0.75),
    ), transition="continue"),
}


def read_stages(given: Any) -> tuple[Stage, ...]:
    """Stages from stages, from dicts, or from words such as "1:8, 0.5:16:0.93, 1:12:0.85".

    The words are scale:steps:sigma_start:shift; what is left out has its default.
    """
    if isinstance(given, str):
        return tuple(_from_words(part) for part in given.split(","))
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"stages={given!r} is not possible: accepted is a list of Stage")
    return tuple(_stage(item) for item in given)


def _stage(item: Any) -> Stage:
    if isinstance(item, Stage):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"{item!r} is not a stage: accepted is Stage(scale, steps, sigma_start, "
                         "shift), or a dict of these")
    try:
        return Stage(**item)
    except TypeError as error:
        raise ValueError(f"{dict(item)!r} is not a stage: {error}") from None


def _from_words(text: str) -> Stage:
    words = [word.strip() for word in text.strip().split(":")]
    try:
        numbers = [float(word) for word in words]
        if not 1 <= len(numbers) <= 4:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text.strip()!r} is not a stage: accepted is "
                         "scale:steps:sigma_start:shift, such as 0.5:16:0.93") from None
    if len(words) > 1 and words[1].isdecimal():
        numbers[1] = int(words[1])
    return Stage(*numbers)


def check_stages(stages: tuple[Stage, ...], transition: str) -> None:
    """Refuse stages that do not make one run."""
    first, last = stages[0], stages[-1]
    check(first.sigma_start == 1, "sigma_start of the first stage", first.sigma_start,
          "1, as it starts from noise")
    check(last.scale == 1, "scale of the last stage", last.scale,
          "1, as the call returns the size it was asked for")
    for stage, following in zip(stages, stages[1:], strict=False):
        if transition == "matched-noise":
            whole = max(stage.scale, following.scale) / min(stage.scale, following.scale)
            check(abs(whole - round(whole)) < 1e-6, "scale", following.scale,
                  "with matched-noise, the scale before times or over a whole number")
        end = stage_end(stage, following, transition)
        check(end < stage.sigma_start, "sigma_start", following.sigma_start,
              f"with {transition}, less than where the stage before starts")


def stage_end(stage: Stage, following: Stage | None, transition: str) -> float:
    """Noise share to which the last step of `stage` goes."""
    if following is None or transition == "restart":
        return 0.0
    if transition == "continue":
        return following.sigma_start
    ratio = ratio_of(following.sigma_start) * stage.scale / following.scale
    return 1.0 if ratio == float("inf") else ratio / (1 + ratio)


def spans(stages: tuple[Stage, ...], transition: str, asked: int) -> list[Span]:
    """The schedules of a call of `asked` steps."""
    return [Span(stage.count(asked), stage.sigma_start, stage_end(stage, following, transition),
                 stage.shift)
            for stage, following in zip(stages, [*stages[1:], None], strict=True)]
