"""What `fastdiff batch` does with its options; the options themselves stand in the command line."""

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import typer

from fastdiff.batch import api, grid, launch
from fastdiff.batch.display import Display
from fastdiff.batch.folder import Folder
from fastdiff.batch.task import Task, distinct
from fastdiff.batch.worker import DeviceLost, Stopped
from fastdiff.cli.errors import InputError, explain

SOME_FAILED = 1


def batch(
    source: Path | None, out: Path | None, *, set_for_all: Sequence[str], grid_words: Sequence[str],
    images: str | None, device: str | None, batch_size: str, gpus: str | None,
    processes: int | None, retry_failed: bool, dry_run: bool, quiet: bool, as_json: bool,
    worker: Path | None, command_line: Sequence[str],
) -> None:
    """Run; leaves with code 1 where a job failed."""
    signal.signal(signal.SIGTERM, _stop)
    if worker is not None:
        _work(worker)
        return
    if out is None:
        raise InputError("give a folder for the results: --output FOLDER")
    if source is None and images is None and not set_for_all and not grid_words:
        raise InputError("nothing to make: give a file of jobs, --images, or --set prompt=...")
    if gpus is not None and (processes is not None or device is not None):
        raise InputError("--gpus goes with neither --processes nor --device")
    count = launch.gpus(gpus) if gpus is not None else processes or 1
    tasks = api.plan(source, grid=grid.grid_of(grid_words), images=images, device=device,
                     defaults=grid.defaults_of(set_for_all))
    folder = Folder(out)
    if dry_run:
        _tell_plan(tasks, folder, as_json)
        return
    options = api.Options(device, _batch_size(batch_size), count, retry_failed,
                          command_line=command_line)
    (rank, _), _ = launch.place()
    if rank != 0:
        # of several that a launcher started, one speaks, and one tries again
        api.run_tasks(tasks, folder, api.Options(
            device, options.batch_size, command_line=command_line), api.Hooks(), lead=False)
        return
    with Display(quiet, as_json) as display:
        hooks = api.Hooks(display.event, display.step)
        outcome = api.run_tasks(tasks, folder, options, hooks)
    display.outcome(outcome, str(out))
    if not outcome.ok:
        raise typer.Exit(SOME_FAILED)


def _work(run: Path) -> None:
    """A worker that `launch` started: the tasks come from the folder of the run."""
    content = json.loads((run / "tasks.json").read_text(encoding="utf-8"))
    tasks = [Task.from_dict(task) for task in content["tasks"]]
    folder = Folder(run.parents[2])
    options = api.Options(batch_size=content["batch_size"], lease=content["lease"],
                          command_line=content["command_line"])
    try:
        api.run_tasks(tasks, folder, options, api.Hooks(), lead=False)
    except (InputError, OSError) as error:
        # another start would end the same way
        part = run / f"error.{os.getpid()}"
        part.write_text(explain(error)[0], encoding="utf-8")
        os.replace(part, run / "error")
        raise
    except DeviceLost as error:
        raise RuntimeError(f"the device stopped working: {error}") from error


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size {text!r}: accepted is auto, or 1 or more")
    return int(text)


def _tell_plan(jobs: Sequence[Task], folder: Folder, as_json: bool) -> None:
    tasks = distinct(jobs)
    settled = [folder.settled(task) for task in tasks]
    if as_json:
        for task, over in zip(tasks, settled, strict=True):
            print(json.dumps({**task.to_dict(), "settled": over}, ensure_ascii=False))
        return
    for task, over in zip(tasks, settled, strict=True):
        print(f"{'settled' if over else 'to make'}  {task.stem}  ({task.where})")
    groups = Counter(task.group for task, over in zip(tasks, settled, strict=True) if not over)
    same = len(jobs) - len(tasks)
    if same:
        print(f"{same} more are the same as one of these")
    print(f"{len(tasks)} jobs, {sum(settled)} settled, {groups.total()} to make in "
          f"{len(groups)} groups")


