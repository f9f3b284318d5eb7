"""Workers and claims: every job exactly once, whoever dies when, and no error is lost."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest
from batch_fake import FakeMaker, logged, task

from fastdiff.batch import api, folder, index
from fastdiff.batch.claims import Claims
from fastdiff.batch.folder import Folder
from fastdiff.batch.sizer import Sizer
from fastdiff.batch.worker import MOST_DEATHS, DeviceLost, Stopped

ROOT = Path(__file__).resolve().parents[1]
LONG = 300  # seconds; only a hang takes them


class Run:
    """A folder, a log, and what to do with them."""

    def __init__(self, home: Path) -> None:
        self.home, self.out, self.log = home, home / "out", home / "log"
        self.folder = Folder(self.out)
        self.events: list[dict] = []

    def work(self, tasks, maker=None, **options) -> api.Outcome:
        hooks = api.Hooks(self.events.append, maker=maker or FakeMaker(self.log))
        return api.run_tasks(tasks, self.folder, api.Options(**options), hooks)

    def start(self, tasks, seconds=0.02) -> subprocess.Popen:
        """A worker process."""
        path = self.home / "tasks.json"
        if not path.exists():
            path.write_text(json.dumps([one.to_dict() for one in tasks]))
        words = [sys.executable, str(ROOT / "tests/batch_fake.py"), self.out, path, seconds]
        return subprocess.Popen([str(word) for word in words])

    def go_on_to(self, results: int) -> None:
        """Worker processes begin no call once so many results are written."""
        part = self.home / "part"
        part.write_text(str(results))
        os.replace(part, self.home / "bound")

    def calls(self) -> list[list[str]]:
        return [ids for ids, _ in logged(self.log, "make")]

    def written(self) -> list[str]:
        return [name for ids, _ in logged(self.log, "wrote") for name in ids]

    def whole(self, tasks) -> None:
        """Every result is there and right, and nothing else is."""
        for one in tasks:
            path = self.folder.result(one)
            assert path is not None, one
            assert path.read_bytes() == b"pixels of " + one.id.encode()
            assert json.loads(Path(f"{path}.json").read_text())["batch"]["id"] == one.id
        names = {path.name for path in self.out.iterdir()} - {index.INDEX, index.SHEET}
        assert names == {folder.HIDDEN, *(f"{one.stem}.png{more}" for one in tasks
                                          for more in ("", ".json"))}
        entries = [json.loads(line) for line in (self.out / index.INDEX).read_text().splitlines()]
        assert sorted(entry["id"] for entry in entries) == sorted(one.id for one in tasks)
        assert {entry["status"] for entry in entries} == {"done"}
        for left in ("claims", "workers", "failed"):
            assert list((self.out / folder.HIDDEN / left).iterdir()) == []


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


# one worker


def test_a_second_run_makes_only_what_is_missing(run):
    tasks = [task(i) for i in range(6)]
    first = run.work(tasks[:4])
    assert first.ok and (first.made, first.skipped) == (4, 0)
    again = run.work(tasks)
    assert again.ok and (again.made, again.skipped) == (2, 4)
    run.folder.result(tasks[1]).unlink()
    third = run.work(tasks)
    assert third.ok and third.made == 1 and third.results[1].name == f"{tasks[1].stem}.png"
    assert run.written().count(tasks[1].id) == 2 and len(run.written()) == 7
    run.whole(tasks)


def test_damaged_results_are_made_again_and_told_as_made(run):
    tasks = [task(i) for i in range(5)]
    assert run.work(tasks).ok
    empty, no_words, cut = (run.folder.result(tasks[i]) for i in range(3))
    empty.write_bytes(b"")
    Path(f"{no_words}.json").write_text("")
    Path(f"{cut}.json").write_text('{"fastdiff_side')
    run.events.clear()
    again = run.work(tasks)
    assert again.ok and (again.made, again.skipped) == (3, 2)
    assert [event["event"] for event in run.events] == ["start", *["done"] * 3, "end"]
    run.whole(tasks)


def test_other_files_in_the_folder_are_let_alone(run):
    tasks = [task(1)]
    run.out.mkdir()
    strange = {"list.json": "[]", "error.json": '{"error": 1}', "note.json": '{"batch": 3}',
               "side.json": '{"batch": {"id": "x"}, "file": "a"}', "bytes.json": "\0"}
    for name, text in strange.items():
        (run.out / name).write_text(text)
    assert run.work(tasks).ok
    for name, text in strange.items():
        assert (run.out / name).read_text() == text
        (run.out / name).unlink()
    run.whole(tasks)


def test_a_failed_job_is_noted_and_the_rest_goes_on(run):
    tasks = [task(i) for i in range(5)]
    bad = FakeMaker(run.log, errors={"number 2": ValueError("no such thing")})
    outcome = run.work(tasks, bad, batch_size=4)
    assert not outcome.ok and outcome.failed == [("fake:2", "no such thing")]
    assert outcome.made == 4 and outcome.results[2] is None
    entries = [json.loads(line) for line in (run.out / index.INDEX).read_text().splitlines()]
    assert [e["error"] for e in entries if e["status"] == "failed"] == ["no such thing"]
    assert "no such thing" in (run.out / index.SHEET).read_text()
    failed = [event for event in run.events if event["event"] == "failed"]
    assert [event["error"] for event in failed] == ["no such thing"]
    # not by itself, since it would fail again
    assert run.work(tasks).made == 0
    outcome = run.work(tasks, retry_failed=True)
    assert outcome.ok and outcome.made == 1
    run.whole(tasks)


def test_one_bad_job_does_not_make_its_group_slow(run):
    tasks = [task(i) for i in range(12)]
    bad = FakeMaker(run.log, errors={"number 1": ValueError("bad")})
    run.work(tasks, bad, batch_size=4)
    assert [len(ids) for ids in run.calls()] == [4, 1, 1, 1, 1, 4, 4]


def test_jobs_that_fail_only_together_are_made_singly(run):
    class NotTogether(FakeMaker):
        def make(self, tasks, on_step):
            found = super().make(tasks, on_step)
            if len(tasks) > 1:
                raise TypeError("one at a time please")
            return found

    tasks = [task(i) for i in range(8)]
    assert run.work(tasks, NotTogether(run.log), batch_size=4).ok
    assert [len(ids) for ids in run.calls()] == [4, *[1] * 8]


def test_out_of_memory_splits_and_goes_on(run):
    tasks = [task(i) for i in range(12)]
    maker = FakeMaker(run.log, most=2)
    assert run.work(tasks, maker, batch_size=8).ok and maker.recovered == 3
    assert [len(ids) for ids in run.calls()] == [8, 4, 2, 2, 4, 2, 2, 2, 2]
    run.whole(tasks)


def test_out_of_memory_alone_is_a_failure_with_advice(run):
    outcome = run.work([task(1)], FakeMaker(run.log, most=0))
    assert "out of memory" in outcome.failed[0][1] and "smaller" in outcome.failed[0][1]


def test_groups_do_not_mix_and_keep_their_order(run):
    tasks = [task(i, group="ab"[i % 2]) for i in range(8)]
    run.work(tasks, batch_size=3)
    assert [[int(name, 16) for name in ids] for ids in run.calls()] == [
        [0, 2, 4], [6], [1, 3, 5], [7]]


def test_an_error_while_saving_is_noted(run):
    tasks = [task(i) for i in range(3)]
    maker = FakeMaker(run.log, write_errors={"number 1": ValueError("cannot encode")})
    outcome = run.work(tasks, maker)
    assert outcome.failed == [("fake:1", "cannot encode")] and outcome.made == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_stops_the_run_and_blames_no_job(run, number):
    tasks = [task(i) for i in range(20)]
    error = OSError(number, os.strerror(number))
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        run.work(tasks, FakeMaker(run.log, write_errors={"number 2": error}), batch_size=1)
    assert raised.value.__cause__ is None
    assert len(run.calls()) < 8
    assert list(run.folder.failures.iterdir()) == []
    assert run.work(tasks).ok
    run.whole(tasks)


def test_a_disk_that_is_full_under_ffmpeg_is_seen(run, monkeypatch):
    monkeypatch.setattr(folder, "_ENOUGH", 2**70)
    maker = FakeMaker(run.log, write_errors={"number 1": RuntimeError("broken pipe")})
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        run.work([task(i) for i in range(3)], maker)


def test_a_folder_that_cannot_be_is_refused(run):
    run.out.write_text("a file")
    with pytest.raises(Exception, match="cannot write in"):
        run.work([task(1)])


def test_stop_ends_at_the_next_step_and_loses_nothing_written(run):
    tasks = [task(i) for i in range(6)]
    stop = Event()

    def on_step(step: int, of: int) -> None:
        if len(run.calls()) == 3:
            stop.set()

    hooks = api.Hooks(on_step=on_step, stop=stop, maker=FakeMaker(run.log))
    with pytest.raises(Stopped):
        api.run_tasks(tasks, run.folder, api.Options(batch_size=1), hooks)
    assert len(run.written()) == 2
    outcome = run.work(tasks)
    assert outcome.ok and outcome.made == 4
    run.whole(tasks)


def test_a_lost_device_leaves_the_jobs_to_be_made_singly(run):
    tasks = [task(i) for i in range(4)]
    broken = FakeMaker(run.log, errors={"number 1": RuntimeError("CUDA error: bad address")})
    with pytest.raises(DeviceLost):
        run.work(tasks, broken, batch_size=4)
    with pytest.raises(DeviceLost):
        run.work(tasks, broken, batch_size=4)
    assert [len(ids) for ids in run.calls()] == [4, 1, 1]
    outcome = run.work(tasks, batch_size=4)
    assert [where for where, _ in outcome.failed] == ["fake:1"]


def test_a_job_that_kills_its_workers_is_given_up(run):
    tasks = [task(i) for i in range(3)]
    run.folder.prepare()
    for _ in range(MOST_DEATHS):
        dead = Claims(run.folder.home)
        assert dead.take(tasks[1].id) is not None
        dead.close()
    outcome = run.work(tasks)
    assert f"{MOST_DEATHS} workers died" in outcome.failed[0][1] and outcome.made == 2
    assert run.work(tasks, retry_failed=True).ok


def test_progress_has_rate_and_time_left(run):
    run.work([task(i) for i in range(3)])
    start, *done, end = run.events
    assert start == {"event": "start", "jobs": 3, "settled": 0, "to_do": 3}
    assert [event["finished"] for event in done] == [1, 2, 3]
    assert done[0]["per_minute"] > 0 and done[-1]["seconds_left"] == 0
    assert end["ok"] and end["made"] == 3


# how many at a time


def test_the_size_grows_while_that_pays():
    sizer, seconds = Sizer(8), {1: 1.0, 2: 1.4, 4: 2.4, 8: 4.7}
    seen = []
    for _ in range(9):
        seen.append(sizer.size)
        sizer.ran(sizer.size, seconds[sizer.size])
    # 8 at a time save 2 percent a job, which is not worth the memory
    assert seen == [1, 1, 2, 2, 4, 4, 8, 8, 4]


def test_the_first_call_may_compile():
    sizer = Sizer(2)
    for seconds in (60.0, 1.0, 50.0, 1.9):
        sizer.ran(sizer.size, seconds)
    assert sizer.size == 2 or sizer.per_job(2) > 0.95


def test_memory_bounds_the_size():
    sizer = Sizer(8, fixed=True)
    sizer.too_much(8)
    assert sizer.size == 4
    sizer.too_much(4)
    sizer.too_much(1)
    assert sizer.size == 1


# claims


def test_a_claim_is_one_workers(tmp_path):
    one, two = Claims(tmp_path), Claims(tmp_path)
    held = one.take("x")
    assert held is not None and held.deaths == 0 and one.held(held)
    assert two.take("x") is None and one.take("x") is None
    one.release(held)
    again = two.take("x")
    assert again is not None and not one.held(held)
    one.close()
    two.close()


def test_a_dead_workers_claim_passes_on_once(tmp_path):
    dead = Claims(tmp_path)
    assert dead.take("x") is not None
    dead.close()
    others = [Claims(tmp_path) for _ in range(4)]
    taken = [claim for other in others if (claim := other.take("x")) is not None]
    assert len(taken) == 1 and taken[0].deaths == 1
    for other in others:
        other.close()


def test_a_worker_of_another_host_is_judged_by_its_heartbeat(tmp_path):
    """Its process cannot be seen, and its clock is not ours."""
    now = 1000.0
    far, near = Claims(tmp_path), Claims(tmp_path, lease=60.0, clock=lambda: now)
    held = far.take("x")
    assert held is not None
    # its heart beats by hand here
    far._stop.set()
    far._heart.join()
    # the claim is a link to the badge: both say that the host is another one
    content = json.loads(far.badge.read_text())
    far.badge.write_text(json.dumps({**content, "host": "elsewhere"}))
    for beat in (5, 7, 6):
        os.utime(far.badge, (beat, beat))
        assert near.take("x") is None
        now += 59.9
        assert near.take("x") is None
    # it beats no longer, like a machine without power
    now += 0.2
    claim = near.take("x")
    assert claim is not None and claim.deaths == 1 and not far.held(held)
    near.close()


def test_a_heart_beats_by_itself_and_writes_a_lost_badge_anew(tmp_path):
    worker, beats = Claims(tmp_path, lease=0.06), []
    worker.on_beat.append(lambda: beats.append(1))
    os.utime(worker.badge, (0, 0))
    _until(lambda: worker.badge.stat().st_mtime > 0 and beats)
    worker.badge.unlink()
    _until(worker.badge.exists)
    worker.close()
    assert not worker.badge.exists()


def test_a_folder_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    one, two = Claims(tmp_path), Claims(tmp_path)
    held = one.take("x")
    assert held is not None and two.take("x") is None
    one.close()
    assert two.take("x") is not None
    two.close()


# several processes


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work_and_survive_a_kill(run, count):
    tasks = [task(i, group=str(i % 3)) for i in range(40)]
    run.go_on_to(6)
    workers = [run.start(tasks) for _ in range(count)]
    _until(lambda: len(run.written()) >= 6
           and len({pid for _, pid in logged(run.log, "make")}) == count)
    workers[0].send_signal(signal.SIGKILL)
    run.go_on_to(len(tasks))
    assert [worker.wait(LONG) for worker in workers] == [-signal.SIGKILL, *[0] * (count - 1)]
    run.whole(tasks)
    _exactly_once(run, tasks, kills=1)


def test_random_kills_lose_nothing(run):
    """Set FASTDIFF_KILLS=50 for the long run."""
    kills, seed = int(os.environ.get("FASTDIFF_KILLS", "8")), 7
    chance = random.Random(seed)
    tasks = [task(i, group=str(i % 4)) for i in range(24 * kills)]
    run.go_on_to(0)
    workers = [run.start(tasks, seconds=0.03) for _ in range(4)]
    for _ in range(kills):
        written = len(run.written())
        # at any moment, but not before somebody could work, and not after all is made
        run.go_on_to(written + 4)
        _until(lambda written=written: len(run.written()) > written)
        time.sleep(chance.uniform(0, 0.1))
        victim = chance.randrange(len(workers))
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = run.start(tasks, seconds=0.03)
    run.go_on_to(len(tasks))
    assert [worker.wait(LONG) for worker in workers] == [0] * 4
    run.work(tasks, FakeMaker(run.log))
    run.whole(tasks)
    _exactly_once(run, tasks, kills)


def _until(true) -> None:
    deadline = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _exactly_once(run: Run, tasks, kills: int) -> None:
    """What is written twice was in flight at a kill: in the writer, or just before its sidecar."""
    written = run.written()
    assert set(written) == {one.id for one in tasks}
    twice = len(written) - len(set(written))
    assert twice <= kills, (twice, kills)
