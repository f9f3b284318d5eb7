"""The output folder: a result and its sidecar for each task, and a note for each that failed.

The sidecar is written last: where it stands, the result is whole. Everything else in the folder
is derived from sidecars and notes, and can be made again.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastdiff.batch.task import Task
from fastdiff.cli import output
from fastdiff.cli.errors import InputError

HIDDEN = ".fastdiff"
# errors of the folder, not of the job: going on would only fail every other job as well
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
          errno.ESTALE, errno.EIO, errno.ENOENT}
_ENOUGH = 2**16


@dataclass
class Folder:
    """Where results are. home: what only this program reads."""

    path: Path
    _read: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.path / HIDDEN

    @property
    def failures(self) -> Path:
        return self.home / "failed"

    def prepare(self) -> None:
        """Make the folder; an InputError where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.failures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write in {str(self.path)!r}: {error.strerror}") from None
        output.writable(self.path)

    def result(self, task: Task) -> Path | None:
        """The file of a task that is done."""
        for suffix in _suffixes(task):
            path = self.path / f"{task.stem}{suffix}"
            if output.sidecar_of(path).is_file() and _size(path):
                return path
        return None

    def error(self, task: Task) -> str | None:
        """Why a task failed."""
        try:
            return json.loads(self._note(task.id).read_text(encoding="utf-8"))["error"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError):
            return "unknown: the note of it cannot be read"

    def settled(self, task: Task) -> bool:
        """Whether a task is done or has failed."""
        return self.result(task) is not None or self._note(task.id).is_file()

    def refresh(self) -> None:
        """See what other machines wrote: a network file system looks anew at what is opened."""
        for path in (self.path, self.failures):
            os.close(os.open(path, os.O_RDONLY))

    def commit(self, path: Path, record: dict[str, Any]) -> None:
        """The result at `path` is whole."""
        output.write_json(output.sidecar_of(path), record)
        self._note(record["batch"]["id"]).unlink(missing_ok=True)

    def fail(self, task: Task, error: str, deaths: int = 0) -> None:
        """Note that a task failed."""
        output.write_json(self._note(task.id), {
            "id": task.id, "stem": task.stem, "where": task.where, "error": error,
            "deaths": deaths, "when": now(), "settings": task.settings.to_dict(),
        })

    def forget(self, tasks: Iterable[Task]) -> int:
        """Drop the notes of failed tasks, so that they are tried again; how many there were."""
        count = 0
        for task in tasks:
            if self._note(task.id).is_file():
                self._note(task.id).unlink(missing_ok=True)
                count += 1
        return count

    def clean(self, task: Task) -> None:
        """Remove the unfinished files of a worker that died with this task."""
        for suffix in (*output.SUFFIX.values(), *(f"{s}.json" for s in output.SUFFIX.values())):
            stem = Path(f"{task.stem}{suffix}").stem
            for part in self.path.glob(f".{stem}.*.part{Path(suffix).suffix}"):
                part.unlink(missing_ok=True)

    def tidy(self, done: set[str]) -> None:
        """Remove unfinished files of tasks that are done: what a dying worker still wrote."""
        for path in self.path.glob(".*.part.*"):
            stem = path.name[1:].partition(".")[0]
            if stem.rpartition("-")[2] in done:
                path.unlink(missing_ok=True)

    def drop_orphans(self, tasks: Iterable[Task]) -> None:
        """Remove sidecars that cannot be read, or whose result was deleted or is empty.

        Those jobs are to be made again.
        """
        for task in tasks:
            for suffix in _suffixes(task):
                path = self.path / f"{task.stem}{suffix}"
                sidecar = output.sidecar_of(path)
                # in this order: who writes now writes the sidecar last
                if sidecar.exists() and not (_size(path) and self._content(sidecar)):
                    sidecar.unlink(missing_ok=True)

    def listing(self) -> tuple[set[str], set[str]]:
        """(ids that are done, ids that failed), by file names alone: fast for many."""
        with os.scandir(self.path) as entries:
            names = [entry.name for entry in entries]
        done = {name.rsplit(".", 2)[0].rpartition("-")[2] for name in names
                if name.endswith(tuple(f"{s}.json" for s in output.SUFFIX.values()))
                and not name.startswith(".")}
        with os.scandir(self.failures) as entries:
            failed = {entry.name[:-5] for entry in entries
                      if entry.name.endswith(".json") and not entry.name.startswith(".")}
        return done, failed - done

    def records(self) -> list[dict[str, Any]]:
        """Every sidecar and every note in the folder, oldest first. Reads only what is new."""
        found = []
        for path in [*self.path.glob("*.json"), *self.failures.glob("*.json")]:
            try:
                content = self._content(path)
            except OSError:
                # removed meanwhile
                continue
            if _is_note(content) or (_is_result(content)
                                     and (self.path / content["file"]).is_file()):
                found.append(self._read[str(path)])
        ours = [content for _, content in sorted(found, key=lambda pair: pair[0])]
        done = {content["batch"]["id"] for content in ours if "batch" in content}
        return [content for content in ours if "batch" in content or content["id"] not in done]

    def _content(self, path: Path) -> dict[str, Any]:
        """A file of JSON, read once; empty where it is something else."""
        stamp = path.stat().st_mtime_ns
        before = self._read.get(str(path))
        if before is not None and before[0] == stamp:
            return before[1]
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            content = {}
        self._read[str(path)] = (stamp, content if isinstance(content, dict) else {})
        return self._read[str(path)][1]

    def _note(self, task_id: str) -> Path:
        return self.failures / f"{task_id}.json"


def fatal(error: BaseException, folder: Path) -> OSError | None:
    """The error of the folder behind `error`, if any: a full disk, no permission, gone."""
    if isinstance(error, OSError) and error.errno in _FATAL:
        return error
    # ffmpeg on a full disk says only that it broke off
    if isinstance(error, Exception) and shutil.disk_usage(folder).free < _ENOUGH:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_result(content: dict[str, Any]) -> bool:
    """Whether it is a sidecar of a batch; other files of a user may lie beside them."""
    batch = content.get("batch")
    return (isinstance(batch, dict) and "id" in batch
            and {"file", "prompt", "plan"} <= content.keys())


def _is_note(content: dict[str, Any]) -> bool:
    return {"id", "error", "settings"} <= content.keys()


def _suffixes(task: Task) -> tuple[str, ...]:
    """A model that says nothing about itself makes known what it makes only when it is loaded."""
    kind = task.settings.kind
    return (output.SUFFIX[kind],) if kind else tuple(output.SUFFIX.values())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
