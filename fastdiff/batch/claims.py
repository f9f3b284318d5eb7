"""Claims: who makes what, over a shared folder, so that work survives a dead worker.

A worker has a badge, a file that it touches every few seconds. A claim is a file `name.1` that
says whose it is; creating it either succeeds or fails, for one worker only. When its owner is
dead, the next one creates `name.2`, again for one worker only, and so on: a claim is never taken
away, only outnumbered, so that nothing depends on who removes what first.

Dead is a worker whose process is gone, where that can be seen (same host), and one whose badge
stood still for the length of the lease, by the clock of the one who looks: clocks of two machines
are never compared.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEASE = 60.0


@dataclass(frozen=True)
class Claim:
    """What this worker holds. deaths: how many workers died with it before."""

    name: str
    number: int

    @property
    def deaths(self) -> int:
        return self.number - 1


@dataclass
class Claims:
    """The claims of one worker in `folder`/claims.

    lease: seconds without a sign of life. clock: seconds, by which others are judged.
    """

    folder: Path
    lease: float = LEASE
    worker: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.folder / "claims"
        self.badges = self.folder / "workers"
        self.home.mkdir(parents=True, exist_ok=True)
        self.badges.mkdir(parents=True, exist_ok=True)
        self.badge = self.badges / self.worker
        self._content = json.dumps({"worker": self.worker, **process()}).encode()
        self.badge.write_bytes(self._content)
        self._stop = threading.Event()
        self.on_beat: list[Callable[[], None]] = []
        self._heart = threading.Thread(target=self._beat, name="fastdiff-heartbeat", daemon=True)
        self._heart.start()

    def take(self, name: str) -> Claim | None:
        """Claim `name`; None when a live worker has it. Look afterwards if it is still to do."""
        number = self._highest(name)
        if number and self._alive(self._owner(name, number)):
            return None
        path = self._path(name, number + 1)
        try:
            # with its content from the first moment
            os.link(self.badge, path)
        except FileExistsError:
            return None
        except OSError:
            if not _create(path, self._content):
                return None
        return Claim(name, number + 1)

    def held(self, claim: Claim) -> bool:
        """Whether a claim is still ours: nobody took us for dead."""
        return (self._highest(claim.name) == claim.number
                and self._owner(claim.name, claim.number) == self.worker)

    def release(self, claim: Claim) -> None:
        """Give a claim back, with those of the dead before it."""
        for number in range(1, claim.number + 1):
            self._path(claim.name, number).unlink(missing_ok=True)

    def put_back(self, claim: Claim) -> None:
        """Give a claim back, but keep those of the dead: the next one knows of them."""
        self._path(claim.name, claim.number).unlink(missing_ok=True)

    def sweep(self, is_over: Callable[[str], bool]) -> None:
        """Remove what the dead left: claims of work that is over, badges that nobody needs."""
        owners = set()
        for name, number in self._all():
            owner = self._owner(name, number)
            if not self._alive(owner) and is_over(name):
                self._path(name, number).unlink(missing_ok=True)
            else:
                owners.add(owner)
        for badge in self.badges.iterdir():
            if badge.name not in owners and not self._alive(badge.name):
                badge.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the heartbeat and hand the badge in. Claims still held are then a dead worker's."""
        self._stop.set()
        self._heart.join()
        self.badge.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(min(5.0, self.lease / 6)):
            try:
                os.utime(self.badge)
            except FileNotFoundError:
                # taken for dead while this machine slept; what was held is looked at before use
                self.badge.write_bytes(self._content)
            except OSError:
                # the folder may be away for a moment; when it stays away, writing a result says so
                continue
            for action in self.on_beat:
                action()

    def _all(self) -> list[tuple[str, int]]:
        found = []
        for entry in os.listdir(self.home):
            name, _, number = entry.rpartition(".")
            if number.isdecimal():
                found.append((name, int(number)))
        return found

    def _highest(self, name: str) -> int:
        return max((number for other, number in self._all() if other == name), default=0)

    def _path(self, name: str, number: int) -> Path:
        return self.home / f"{name}.{number}"

    def _owner(self, name: str, number: int) -> str:
        """The worker of a claim; one that cannot be read stands for itself."""
        try:
            return json.loads(self._path(name, number).read_text(encoding="utf-8"))["worker"]
        except (OSError, ValueError, KeyError):
            return f"../claims/{name}.{number}"

    def _alive(self, worker: str) -> bool:
        if worker == self.worker:
            return True
        badge = self.badges / worker
        try:
            beat = badge.stat().st_mtime_ns
            content: dict[str, Any] = json.loads(badge.read_text(encoding="utf-8") or "{}")
        except FileNotFoundError:
            # it handed in its badge, and left this behind
            return False
        except ValueError:
            content = {}
        if gone(content):
            return False
        seen = self._seen.get(worker)
        if seen is None or seen[0] != beat:
            self._seen[worker] = (beat, self.clock())
            return True
        return self.clock() - seen[1] < self.lease


def process() -> dict[str, Any]:
    """This process, so that others on the same host can see whether it lives."""
    return {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}


def gone(content: dict[str, Any]) -> bool:
    """Whether a process that can be seen from here no longer runs. False where it cannot."""
    if not content.get("host") or content["host"] != _host():
        return False
    return _born(content["pid"]) != content["born"]


def _host() -> str | None:
    """Name, boot and process namespace: two containers of one machine are two hosts."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> int | None:
    """When a process started, in ticks since boot; None when it is gone or only waits to be."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # a killed process is a zombie while a thread of it still ends a write
    return None if state in "ZX" and int(fields[16]) <= 1 else int(fields[18])


def _create(path: Path, content: bytes) -> bool:
    """For a folder that has no hard links."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(file, content)
    finally:
        os.close(file)
    return True
