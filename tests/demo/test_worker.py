"""The worker: turns, bounds, stopping, and that it outlives every failure."""

import threading
import time

import pytest

from fastdiff.cli.errors import InputError
from fastdiff.demo.worker import DONE, FAILED, STOPPED, WAITING, Worker

LONG = 300  # seconds; only a hang takes them


@pytest.fixture
def worker():
    found = Worker(queue=8, per_user=3, after=lambda: None)
    yield found
    found.close()


@pytest.fixture
def gate():
    """A job that runs until the event is set, and says that it began."""
    class Gate:
        def __init__(self):
            self.begun, self.go = threading.Event(), threading.Event()

        def __call__(self, ticket):
            self.begun.set()
            while not self.go.wait(0.01):
                ticket.check()
            return "made"

    return Gate()


def wait(*tickets):
    for ticket in tickets:
        assert ticket.over.wait(LONG)


def test_a_job_runs_and_its_result_is_kept(worker):
    ticket = worker.submit("a", lambda ticket: 42, LONG)
    wait(ticket)
    assert (ticket.state, ticket.result, ticket.problem) == (DONE, 42, "")
    assert worker.load == 0


def test_users_take_turns(worker, gate):
    order = []
    first = worker.submit("a", gate, LONG)
    assert gate.begun.wait(LONG)
    later = [worker.submit(user, lambda ticket: order.append(ticket.user), LONG)
             for user in ("a", "a", "b", "c", "b")]
    assert [worker.position(ticket) for ticket in later] == [1, 4, 2, 3, 5]
    gate.go.set()
    wait(first, *later)
    assert order == ["a", "b", "c", "a", "b"]


def test_bounds_are_told(worker, gate):
    worker.submit("a", gate, LONG)
    assert gate.begun.wait(LONG)
    worker.submit("a", gate, LONG)
    worker.submit("a", gate, LONG)
    with pytest.raises(InputError, match="3 of your jobs are waiting or running"):
        worker.submit("a", gate, LONG)
    for user in "bcdef":
        worker.submit(user, gate, LONG)
    with pytest.raises(InputError, match=r"the queue is full \(8 jobs\)"):
        worker.submit("g", gate, LONG)
    gate.go.set()


def test_stop_ends_what_runs_and_what_waits_of_one_user(worker, gate):
    running = worker.submit("a", gate, LONG)
    assert gate.begun.wait(LONG)
    waiting, other = worker.submit("a", gate, LONG), worker.submit("b", lambda ticket: "b", LONG)
    assert worker.stop("a") == 2
    wait(running, waiting, other)
    assert (running.state, waiting.state, other.state) == (STOPPED, STOPPED, DONE)
    assert worker.stop("a") == 0


def test_a_failed_job_says_a_sentence_and_the_next_runs():
    righted = []
    worker = Worker(queue=8, per_user=8, after=lambda: righted.append(1))

    def fails(error):
        def work(ticket):
            raise error
        return worker.submit("a", work, LONG)

    memory = fails(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    bad = fails(InputError("the size is odd: use --size 32"))
    odd = fails(KeyError("/secret/path"))
    good = worker.submit("a", lambda ticket: 1, LONG)
    wait(memory, bad, odd, good)
    assert "out of memory" in memory.problem and memory.state == FAILED
    assert bad.problem == "the size is odd: use size 32"
    assert odd.problem.startswith("something unexpected went wrong (KeyError)")
    assert "secret" not in odd.problem
    assert good.state == DONE and len(righted) == 3
    worker.close()


def test_even_setting_right_may_fail():
    def breaks():
        raise RuntimeError("no")

    def fails(ticket):
        raise ValueError("no")

    worker = Worker(queue=8, per_user=8, after=breaks)
    first = worker.submit("a", fails, LONG)
    second = worker.submit("a", lambda ticket: 1, LONG)
    wait(first, second)
    assert second.state == DONE
    worker.close()


def test_a_job_may_not_take_for_ever(worker):
    def slow(ticket):
        while True:
            time.sleep(0.01)
            ticket.check()

    ticket = worker.submit("a", slow, 0.05)
    wait(ticket)
    assert ticket.state == FAILED and "stopped after 0.05 seconds" in ticket.problem


def test_fifty_users_at_once_lose_nothing():
    worker = Worker(queue=50, per_user=1, after=lambda: None)
    tickets, lock = [], threading.Lock()

    def ask(number):
        ticket = worker.submit(f"user {number}", lambda ticket: number * number, LONG)
        with lock:
            tickets.append((number, ticket))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait(*(ticket for _, ticket in tickets))
    assert len(tickets) == 50
    assert all(ticket.result == number * number for number, ticket in tickets)
    assert worker.load == 0
    worker.close()


def test_closing_ends_what_waits(gate):
    worker = Worker(queue=8, per_user=8, after=lambda: None)
    running = worker.submit("a", gate, LONG)
    assert gate.begun.wait(LONG)
    waiting = worker.submit("a", gate, LONG)
    assert waiting.state == WAITING
    worker.close()
    assert (running.state, waiting.state) == (STOPPED, STOPPED)
