"""StepClock: the step and the guidance branch of the running pipeline call."""

from dataclasses import dataclass, field


@dataclass
class StepClock:
    """Counts the scheduler's steps.

    step: index of the step being computed, None while no scheduler drives the model.
    steps: number of steps of this run.
    branch: guidance branch as the pipeline names it ("cond", "uncond"), None where it has none.
    run: counts runs, so that state of an earlier run is never taken for this one's.
    """

    step: int | None = None
    steps: int = 0
    branch: str | None = None
    run: int = 0
    _begin: list = field(default_factory=list, repr=False)
    _advance: list = field(default_factory=list, repr=False)

    def begin(self, steps: int) -> None:
        """A new run of `steps` steps starts."""
        self.step, self.steps = 0, steps
        self.run += 1
        for listener in self._begin:
            listener()

    def advance(self) -> None:
        if self.step is not None:
            self.step += 1
            for listener in self._advance:
                listener()

    def on_begin(self, listener) -> None:
        self._begin.append(listener)

    def on_advance(self, listener) -> None:
        self._advance.append(listener)

    def __deepcopy__(self, memo: dict) -> "StepClock":
        # pipelines copy their scheduler for a second modality; the copy must not drive our clock
        return StepClock()
