"""A worker whose jobs cost nothing: tasks, a maker that logs what it does, and a program to kill.

python tests/batch_fake.py OUT TASKS.json SECONDS
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from fastdiff.batch import api  # noqa: E402
from fastdiff.batch.folder import Folder  # noqa: E402
from fastdiff.batch.maker import Made  # noqa: E402
from fastdiff.batch.task import Task  # noqa: E402
from fastdiff.cli import output  # noqa: E402
from fastdiff.cli.sampling import OnStep  # noqa: E402
from fastdiff.cli.sidecar import Settings  # noqa: E402


def task(number: int, group: str = "a", prompt: str | None = None) -> Task:
    """A task with a name of its own."""
    settings = Settings(
        prompt=prompt or f"number {number}", negative=None, model="fake", kind="image",
        method="stock", plan=None, seed=number, steps=2, guidance=None, height=8, width=8,
        frames=1, fps=8, dtype="float32", device="cpu")
    name = f"{number:012x}"
    return Task(name, f"{output.slug(settings.prompt)}-seed{number}-{name}", group, settings,
                f"fake:{number}")


@dataclass
class FakeMaker:
    """Sleeps in place of denoising. log: a file that gets a line for everything it does.

    errors: what to raise for a prompt. most: more in one call are out of memory. bound: a file with
    a number; a call waits while so many results are written.
    """

    log: Path
    seconds: float = 0.0
    errors: dict[str, BaseException] = field(default_factory=dict)
    write_errors: dict[str, BaseException] = field(default_factory=dict)
    most: int = 1000
    recovered: int = 0
    bound: Path | None = None

    def check(self, tasks: Sequence[Task]) -> None:
        return

    def make(self, tasks: Sequence[Task], on_step: OnStep) -> list[Made | Exception]:
        self._say("make", [one.id for one in tasks])
        while self.bound and len(logged(self.log, "wrote")) >= int(self.bound.read_text()):
            time.sleep(0.01)
        for step in range(2):
            time.sleep(self.seconds / 2)
            on_step(step + 1, 2)
        if len(tasks) > self.most:
            raise MemoryError
        for one in tasks:
            if one.settings.prompt in self.errors:
                raise self.errors[one.settings.prompt]
        return [Made(one, b"pixels of " + one.id.encode(), len(tasks), self.seconds or 1e-4)
                for one in tasks]

    def write(self, made: Made, folder: Path) -> tuple[Path, dict[str, Any]]:
        task = made.task
        if task.settings.prompt in self.write_errors:
            raise self.write_errors[task.settings.prompt]
        path = folder / f"{task.stem}.png"
        with output.atomic(path) as part:
            part.write_bytes(made.content)
        self._say("wrote", [task.id])
        return path, {"file": path.name, **task.settings.to_dict(), "report": None,
                      "seconds": made.seconds / made.together, "batch": made.about()}

    def recover(self) -> None:
        self.recovered += 1

    def _say(self, what: str, ids: list[str]) -> None:
        line = json.dumps([what, ids, os.getpid()]) + "\n"
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)


def logged(log: Path, what: str) -> list[tuple[list[str], int]]:
    """(ids, process) of every line about `what`."""
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(ids, pid) for kind, ids, pid in lines if kind == what]


def main() -> None:
    out, tasks, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    several = [Task.from_dict(one) for one in json.loads(tasks.read_text())]
    maker = FakeMaker(out.parent / "log", seconds, bound=out.parent / "bound")
    api.run_tasks(several, Folder(out), api.Options(), api.Hooks(maker=maker))


if __name__ == "__main__":
    main()
