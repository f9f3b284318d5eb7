"""Worker: one thread that runs jobs in turn, fair between users, bounded, stoppable."""

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from fastdiff.cli.errors import InputError
from fastdiff.demo.sentences import sentence

logger = logging.getLogger("fastdiff.demo")

WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"
OVER = (DONE, STOPPED, FAILED)


class Stopped(Exception):
    """The user asked for an end, or the time is over."""


class Ticket:
    """One job and how far it is. Written by the worker's thread, read by the page.

    phase: what it is doing, in a word. step, steps: within this phase. preview: JPEG bytes of the
    latents now. result: what the job returned. problem: a sentence, when it failed. ended: set
    when the job shall end.
    """

    def __init__(self, user: str, work: Callable[["Ticket"], Any], seconds: float) -> None:
        self.user, self.work, self.seconds = user, work, seconds
        self.state = WAITING
        self.phase = ""
        self.step = self.steps = 0
        self.preview: bytes | None = None
        self.result: Any = None
        self.problem = ""
        self.began: float | None = None
        self.ended_at: float | None = None
        self.over = threading.Event()
        self.ended = threading.Event()

    def enter(self, phase: str, steps: int = 0) -> None:
        """A new phase of this job begins."""
        self.check()
        self.phase, self.step, self.steps = phase, 0, steps

    def check(self) -> None:
        """Raise `Stopped` if this job shall end. Called between layers, so an end is near."""
        if self.ended.is_set():
            raise Stopped
        if self.began is not None and time.monotonic() - self.began > self.seconds:
            raise InputError(f"stopped after {self.seconds:g} seconds, the most that a job may "
                             "take here: ask for fewer steps, fewer frames or a smaller size")

    def stop(self) -> None:
        """Ask for an end."""
        self.ended.set()

    @property
    def stopping(self) -> bool:
        return self.ended.is_set() and self.state == RUNNING

    @property
    def elapsed(self) -> float:
        """Seconds since it began to run, at most until its end."""
        end = self.ended_at or time.monotonic()
        return 0.0 if self.began is None else end - self.began

    def close(self, state: str) -> None:
        self.preview = None
        self.work = _nothing
        self.state, self.ended_at = state, time.monotonic()
        self.over.set()


def _nothing(ticket: Ticket) -> None:
    raise RuntimeError("this job is over")


class Worker:
    """Runs one job at a time; users take turns, and each user's jobs keep their order.

    queue: jobs that may wait or run. per_user: of them, of one user. after: called after a job that
    failed, to set things right.
    """

    def __init__(self, queue: int, per_user: int, after: Callable[[], None]) -> None:
        self._most, self._per_user, self._after = queue, per_user, after
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="fastdiff-demo", daemon=True)
        self._thread.start()

    def submit(self, user: str, work: Callable[[Ticket], Any], seconds: float) -> Ticket:
        """Put a job in the queue; an InputError says when there is no room."""
        with self._changed:
            mine = self.of(user)
            if len(mine) >= self._per_user:
                raise InputError(f"{len(mine)} of your jobs are waiting or running already, the "
                                 "most for one page: wait for one, or stop it")
            if self.load >= self._most:
                raise InputError(f"the queue is full ({self._most} jobs): try again in a while")
            ticket = Ticket(user, work, seconds)
            self._waiting.setdefault(user, deque()).append(ticket)
            self._changed.notify()
            return ticket

    def of(self, user: str) -> list[Ticket]:
        """The jobs of a user that wait or run."""
        with self._changed:
            mine = list(self._waiting.get(user, ()))
            if self._running is not None and self._running.user == user:
                mine.append(self._running)
            return mine

    def stop(self, user: str) -> int:
        """End all jobs of a user; how many there were."""
        mine = self.of(user)
        for ticket in mine:
            self.drop(ticket)
        return len(mine)

    def drop(self, ticket: Ticket) -> None:
        """End one job, whether it waits or runs."""
        with self._changed:
            ticket.stop()
            queue = self._waiting.get(ticket.user)
            if queue is not None and ticket in queue:
                queue.remove(ticket)
                if not queue:
                    del self._waiting[ticket.user]
                ticket.close(STOPPED)

    @property
    def load(self) -> int:
        """Jobs that wait or run."""
        with self._changed:
            waiting = sum(len(queue) for queue in self._waiting.values())
            return waiting + (self._running is not None)

    def position(self, ticket: Ticket) -> int:
        """Jobs that come before this one, the running one included."""
        with self._changed:
            queues = [list(queue) for queue in self._waiting.values()]
            turns = itertools.zip_longest(*queues)
            order = [waiting for turn in turns for waiting in turn if waiting is not None]
            before = order.index(ticket) if ticket in order else 0
            return before + (self._running is not None and self._running is not ticket)

    def close(self) -> None:
        """Stop everything and end the thread."""
        with self._changed:
            self._open = False
            for queue in self._waiting.values():
                for ticket in queue:
                    ticket.close(STOPPED)
            self._waiting.clear()
            if self._running is not None:
                self._running.stop()
            self._changed.notify()
        self._thread.join(timeout=30)

    def _next(self) -> Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            if not self._waiting:
                return None
            user, queue = self._waiting.popitem(last=False)
            ticket = queue.popleft()
            if queue:
                # to the end of the round: the others have their turn first
                self._waiting[user] = queue
            self._running = ticket
            ticket.began = time.monotonic()
            ticket.state = RUNNING
            return ticket

    def _run(self) -> None:
        while (ticket := self._next()) is not None:
            state = FAILED
            try:
                ticket.check()
                ticket.result = ticket.work(ticket)
                state = DONE
            except Stopped:
                state = STOPPED
            except BaseException as error:
                # whatever happened to this job, the next visitor is served
                ticket.problem, expected = sentence(error)
                if not expected:
                    logger.exception("a job failed")
            if state != DONE:
                self._set_right()
            with self._changed:
                self._running = None
            ticket.close(state)
            del ticket

    def _set_right(self) -> None:
        try:
            self._after()
        except Exception:
            logger.exception("after a job that did not finish")
