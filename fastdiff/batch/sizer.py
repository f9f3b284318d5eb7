"""How many jobs of a group go into one call: found by measuring the jobs themselves."""

from collections import defaultdict
from dataclasses import dataclass, field

# a larger call must take at least this much less time a job to be worth its memory
_WORTH = 0.95


@dataclass
class Sizer:
    """Doubles the size of a call while that saves time.

    most: never more in one call. fixed: always that many. The first call of a size may include
    compiling, so that a size is judged by the faster one of two.
    """

    most: int
    fixed: bool = False
    size: int = 0
    _seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.size = self.most if self.fixed else 1
        self._settled = self.fixed

    def ran(self, count: int, seconds: float) -> None:
        """A call with `count` jobs took `seconds`."""
        self._seconds[count].append(seconds / count)
        if self._settled or count != self.size or len(self._seconds[count]) < 2:
            return
        if count > 1 and self.per_job(count) > _WORTH * self.per_job(count // 2):
            self.size, self._settled = count // 2, True
        elif count * 2 <= self.most:
            self.size = count * 2
        else:
            self._settled = True

    def too_much(self, count: int) -> None:
        """A call with `count` jobs did not fit into memory."""
        self.most = max(1, min(self.most, count // 2))
        self.size, self._settled = self.most, True

    def per_job(self, count: int) -> float:
        """Seconds a job in the fastest call of this size."""
        return min(self._seconds[count])
