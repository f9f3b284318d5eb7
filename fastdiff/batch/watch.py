"""Watch: follows the folder of a run, whoever works in it, and tells what is new."""

import json
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.batch.folder import Folder
from fastdiff.batch.task import Task
from fastdiff.cli import output

OnEvent = Callable[[dict[str, Any]], None]
# results that the rate is taken from
_RECENT = 64


@dataclass(frozen=True)
class Gain:
    """What calls with several jobs saved, from the times of the jobs themselves.

    alone, together: median seconds a job. size: jobs of the larger calls.
    """

    group: str
    size: int
    alone: float
    together: float

    @property
    def factor(self) -> float:
        return self.alone / self.together


class Watch:
    """Tells each result and each failure once, with the rate and the time left.

    Events are plain dicts: "start", "done", "failed", "end"; docs/batch.md lists their fields.
    """

    def __init__(self, tasks: Sequence[Task], folder: Folder, on_event: OnEvent) -> None:
        self._folder, self._tell = folder, on_event
        self._tasks = {task.id: task for task in tasks}
        self._order = {task.id: number for number, task in enumerate(tasks)}
        self._left = {task.id for task in tasks if not folder.settled(task)}
        self._finished: deque[float] = deque(maxlen=_RECENT)
        self._next = self._began = time.monotonic()
        self._times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.made = self.failed = 0
        self.skipped = len(tasks) - len(self._left)
        self._tell({"event": "start", "jobs": len(tasks), "settled": self.skipped,
                    "to_do": len(self._left)})

    @property
    def left(self) -> int:
        return len(self._left)

    def look(self, now: bool = False) -> None:
        """Tell what is new. Looks at most so often that it costs little, unless `now`."""
        begin = time.monotonic()
        if begin < self._next and not now:
            return
        done, failed = self._folder.listing()
        fresh = self._left & (done | failed)
        for task_id in sorted(fresh, key=self._order.__getitem__):
            self._left.discard(task_id)
            self._finished.append(time.monotonic())
            self._report(self._tasks[task_id], task_id in done)
        self._next = begin + max(0.5, 20 * (time.monotonic() - begin))

    def rate(self) -> float | None:
        """Results a second; None before the first."""
        if not self._finished:
            return None
        first = self._began if len(self._finished) < _RECENT else self._finished[0]
        return len(self._finished) / max(time.monotonic() - first, 1e-9)

    def gains(self) -> list[Gain]:
        """Of every group that ran singly and several at a time."""
        found = []
        for group, sizes in self._times.items():
            # the first call may include compiling
            alone = sizes.get(1, [])[1:]
            several = {size: statistics.median(times) for size, times in sizes.items() if size > 1}
            if alone and several:
                size = min(several, key=lambda size: several[size])
                found.append(Gain(group, size, statistics.median(alone), several[size]))
        return found

    def _report(self, task: Task, is_done: bool) -> None:
        told: dict[str, Any] = {"id": task.id, "where": task.where, "prompt": task.settings.prompt,
                                "seed": task.settings.seed}
        path = self._folder.result(task) if is_done else None
        if path is not None:
            self.made += 1
            record = json.loads(output.sidecar_of(path).read_text(encoding="utf-8"))
            self._times[task.group][record["batch"]["size"]].append(record["seconds"])
            told |= {"event": "done", "file": str(path), "seconds": record["seconds"],
                     "together": record["batch"]["size"]}
        else:
            self.failed += 1
            told |= {"event": "failed", "error": self._folder.error(task)}
        rate = self.rate()
        told |= {"finished": len(self._tasks) - len(self._left), "jobs": len(self._tasks),
                 "per_minute": None if rate is None else 60 * rate,
                 "seconds_left": None if rate is None else len(self._left) / rate}
        self._tell(told)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves. results: files in the order of the jobs; None for one that failed.

    failed: (where, error) of each. made, skipped: made now, and settled before.
    """

    results: list[Path | None]
    failed: list[tuple[str, str]]
    made: int
    skipped: int
    seconds: float
    gains: list[Gain]

    @property
    def ok(self) -> bool:
        return not self.failed and None not in self.results
