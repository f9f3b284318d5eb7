"""A worker: claims jobs of one group, makes them in one call, hands them to the writer, repeats."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event

from fastdiff.batch.claims import Claim, Claims
from fastdiff.batch.folder import Folder
from fastdiff.batch.maker import Made, Maker
from fastdiff.batch.sizer import Sizer
from fastdiff.batch.task import Task
from fastdiff.batch.writer import Writer
from fastdiff.cli.errors import explain, out_of_memory
from fastdiff.cli.sampling import OnStep

# so many workers may die with a job before it is taken for the cause
MOST_DEATHS = 5
_PAUSE = 0.2


class Stopped(KeyboardInterrupt):
    """The run was asked to stop."""


class DeviceLost(RuntimeError):
    """The device no longer works in this process; another one may go on."""


@dataclass
class Worker:
    """One process at work on `tasks`, which others may share.

    most: jobs of one call at most; fixed: always that many where there are. place: (rank, of)
    where to begin, so that workers do not meet. stop: set to end at the next step. on_pass: called
    after every call of the pipeline, and every pause.
    """

    tasks: Sequence[Task]
    folder: Folder
    claims: Claims
    maker: Maker
    most: int = 8
    fixed: bool = False
    place: tuple[int, int] = (0, 1)
    stop: Event = field(default_factory=Event)
    on_step: OnStep = lambda step, of: None
    on_pass: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        rank, of = self.place
        self._left = deque(_in_order(self.tasks))
        self._left.rotate(-(rank * len(self._left) // of))
        self._sizers: dict[str, Sizer] = {}
        self._singly: set[str] = set()
        self._held: dict[str, Claim] = {}
        self._failures = 0

    def run(self) -> None:
        """Until every task is done or has failed, by whomever."""
        writer = Writer(self.folder, self.claims, self.maker)
        try:
            while self._left:
                self._heed()
                tasks = self._claim()
                if tasks:
                    self._make(tasks, writer)
                elif self._left:
                    # all that is left is in others' hands; should one die, its jobs come free
                    time.sleep(_PAUSE)
                writer.check()
                self.on_pass()
        except DeviceLost:
            # the claims stay, as those of a dead worker: the next one makes these jobs singly
            raise
        except BaseException:
            for claim in self._held.values():
                self.claims.release(claim)
            raise
        finally:
            # what is already made is worth its seconds of writing, whatever ends the run
            writer.close()

    def _heed(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _claim(self) -> list[Task]:
        """The next jobs of one group that nobody has; forgets those that are settled."""
        found: list[Task] = []
        others: list[Task] = []
        for _ in range(len(self._left)):
            task = self._left[0]
            if found and (task.group != found[0].group or len(found) >= self._size(task)):
                break
            self._left.popleft()
            if self.folder.settled(task):
                continue
            claim = self.claims.take(task.id)
            if claim is None:
                others.append(task)
                continue
            self._held[task.id] = claim
            self.folder.refresh()
            if self.folder.settled(task) or not self._may_live(task, claim):
                # done between the look and the claim, or given up
                self._release(task)
                continue
            if claim.deaths and found:
                # what a worker died with goes alone, so that it is known which job it was
                self.claims.put_back(self._held.pop(task.id))
                self._left.appendleft(task)
                break
            found.append(task)
            if claim.deaths:
                break
        # after everything else it is seen what became of what others hold
        self._left.extend(others)
        return found

    def _may_live(self, task: Task, claim: Claim) -> bool:
        if not claim.deaths:
            return True
        self.folder.clean(task)
        if claim.deaths < MOST_DEATHS:
            return True
        self.folder.fail(task, f"{claim.deaths} workers died while making it; --retry-failed "
                         "tries it again")
        return False

    def _size(self, task: Task) -> int:
        if task.image is not None or task.group in self._singly:
            return 1
        return self._sizer(task).size

    def _sizer(self, task: Task) -> Sizer:
        return self._sizers.setdefault(task.group, Sizer(self.most, self.fixed))

    def _make(self, tasks: list[Task], writer: Writer) -> None:
        try:
            made = self.maker.make(tasks, self._stepped)
        except Exception as error:
            self._rescue(tasks, writer, error)
            return
        done = [one for one in made if isinstance(one, Made)]
        if done and len(done) == len(tasks):
            self._sizer(tasks[0]).ran(len(tasks), done[0].seconds)
        for task, one in zip(tasks, made, strict=True):
            if not isinstance(one, Made):
                self._fail(task, one)
        # from here on the claims are the writer's to give back
        writer.put([(self._held.pop(one.task.id), one) for one in done])

    def _rescue(self, tasks: list[Task], writer: Writer, error: Exception) -> None:
        """Split what ran out of memory; make singly what failed together; note what fails alone."""
        if _device_lost(error):
            if len(tasks) == 1:
                self._fail(tasks[0], error)
            raise DeviceLost(explain(error)[0]) from error
        no_memory = out_of_memory(error)
        if no_memory:
            # the traceback holds the tensors that did not fit
            error.__traceback__ = None
            self.maker.recover()
        if len(tasks) == 1:
            self._fail(tasks[0], error)
            return
        if no_memory:
            self._sizer(tasks[0]).too_much(len(tasks))
            middle = len(tasks) // 2
            parts = [tasks[:middle], tasks[middle:]]
        else:
            parts = [[task] for task in tasks]
        before = self._failures
        for part in parts:
            self._heed()
            self._make(part, writer)
        if not no_memory and self._failures == before:
            # nothing is wrong with any of them but being together
            self._singly.add(tasks[0].group)

    def _fail(self, task: Task, error: Exception) -> None:
        self._failures += 1
        self.folder.fail(task, explain(error)[0])
        self._release(task)

    def _release(self, task: Task) -> None:
        self.claims.release(self._held.pop(task.id))

    def _stepped(self, step: int, of: int) -> None:
        self._heed()
        self.on_step(step, of)


def _in_order(tasks: Sequence[Task]) -> list[Task]:
    """As given, but the tasks of one model together, and in it those of one group."""
    first: dict[str, int] = {}
    for number, task in enumerate(tasks):
        first.setdefault(task.model_key, number)
        first.setdefault(task.group, number)
    return sorted(tasks, key=lambda task: (first[task.model_key], first[task.group]))


def _device_lost(error: Exception) -> bool:
    """Whether CUDA's context is broken, so that nothing more can run in this process."""
    name, text = type(error).__name__, str(error)
    return not out_of_memory(error) and (
        name == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text)
