"""Run many jobs: the Python side of `fastdiff batch`."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from fastdiff.batch import grid as grids
from fastdiff.batch import index, launch, lines
from fastdiff.batch.claims import LEASE, Claims
from fastdiff.batch.folder import Folder
from fastdiff.batch.maker import Load, Maker, PipelineMaker
from fastdiff.batch.task import Planner, Task, distinct
from fastdiff.batch.watch import OnEvent, Outcome, Watch
from fastdiff.batch.worker import Worker
from fastdiff.cli.errors import InputError
from fastdiff.cli.sampling import OnStep

MOST = 8
_INDEX_EVERY = 30.0


@dataclass(frozen=True)
class Options:
    """How a run works. docs/batch.md tells each. launched: even one worker is another process."""

    device: str | None = None
    batch_size: int | None = None
    processes: int = 1
    retry_failed: bool = False
    lease: float = LEASE
    launched: bool = False
    command_line: Sequence[str] = ()


@dataclass
class Hooks:
    """Who is told, who may stop it, and what makes the results."""

    on_event: OnEvent = lambda event: None
    on_step: OnStep = lambda step, of: None
    stop: Event = field(default_factory=Event)
    maker: Maker | None = None


def run(
    jobs: str | Path | Iterable[str | Mapping[str, Any]], out: str | Path, *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    defaults: Mapping[str, Any] | None = None, images: str | None = None,
    device: str | None = None, batch_size: int | None = None, processes: int = 1,
    retry_failed: bool = False, on_event: OnEvent | None = None, on_step: OnStep | None = None,
    stop: Event | None = None, load: Load | None = None,
) -> Outcome:
    """Make every job that has no result in the folder `out` yet.

    jobs: a .jsonl, .csv or text file, or prompts and dicts of fields (those of `fastdiff
        generate`, and options of methods). grid: {field: values}, multiplied with every job.
    defaults: fields for jobs that leave them open. images: a glob of pictures to start from.
    device: None is the GPU where there is one. batch_size: jobs in one call of the pipeline; None
        finds out what is fastest, up to 8. processes: more than one starts so many workers, each
        on its own GPU where there are GPUs. retry_failed: try again what failed before.
    on_event: told of each result, see docs/batch.md. on_step: (step, steps) of the call that
        runs here. stop: set it to end at the next step. load: (model, settings, show) -> a
        pipeline that is there already.

    Raises InputError (see `str(error)`) before anything runs where a job cannot be made as asked,
    naming file and line, and OSError where the folder cannot be written. A job that fails while
    it runs is in the outcome's `failed`. Interrupted work is taken up by the next call.
    """
    if load is not None and processes > 1:
        raise InputError("load= gives a pipeline of this process: use processes=1")
    tasks = plan(jobs, grid=grid, defaults=defaults, images=images, device=device)
    hooks = Hooks(on_event or (lambda event: None), on_step or (lambda step, of: None),
                  stop or Event(), PipelineMaker(load=load) if load else None)
    options = Options(device, batch_size, processes, retry_failed)
    return run_tasks(tasks, Folder(Path(out)), options, hooks)


def plan(
    jobs: str | Path | Iterable[str | Mapping[str, Any]] | None, *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    defaults: Mapping[str, Any] | None = None, images: str | None = None,
    device: str | None = None,
) -> list[Task]:
    """The jobs, resolved and checked as far as that needs no weights."""
    grid = dict(grid or {})
    if images is not None:
        grid = {"image": grids.images_of(images), **grid}
    if jobs is None:
        start = [lines.Line("--set and --grid", {})]
    else:
        start = lines.read(Path(jobs)) if isinstance(jobs, (str, Path)) else lines.given(jobs)
    return Planner(device).plan(grids.expand(start, grid, defaults or {}))


def run_tasks(
    jobs: Sequence[Task], folder: Folder, options: Options, hooks: Hooks, lead: bool = True
) -> Outcome:
    """Run planned jobs in this process, or in several; those of the same content are one task.

    lead: False for one of several processes that another one waits for; that one writes the index.
    """
    begin = time.monotonic()
    tasks = distinct(jobs)
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"batch_size={options.batch_size}: accepted is 1 or more")
    if options.processes > 1 and ":" in (options.device or ""):
        raise InputError(f"device {options.device!r} is one device, and there are "
                         f"{options.processes} workers: leave it out")
    folder.prepare()
    folder.drop_orphans(tasks)
    if options.retry_failed:
        folder.forget(tasks)
    claims = Claims(folder.home, options.lease)
    try:
        watch = Watch(tasks, folder, hooks.on_event)
        try:
            if watch.left and (options.processes > 1 or options.launched):
                launch.workers(tasks, folder, options, watch, hooks.stop)
            elif watch.left:
                _here(tasks, folder, claims, options, hooks, watch)
        finally:
            # on a full disk there is nothing to be done about the index; the error says why
            with suppress(OSError):
                watch.look(now=True)
                if lead:
                    _put_in_order(folder, claims)
    finally:
        claims.close()
    results = [folder.result(task) for task in jobs]
    errors = [(task.where, folder.error(task) or "not made")
              for task, path in zip(jobs, results, strict=True) if path is None]
    outcome = Outcome(results, errors, watch.made, watch.skipped, time.monotonic() - begin,
                      watch.gains())
    hooks.on_event({"event": "end", "made": outcome.made, "skipped": outcome.skipped,
                    "failed": len(errors), "seconds": outcome.seconds, "ok": outcome.ok})
    return outcome


def _put_in_order(folder: Folder, claims: Claims) -> None:
    index.write(folder, claims)
    done, failed = folder.listing()
    claims.sweep(lambda name: name in done or name in failed)
    folder.tidy(done)


def _here(
    tasks: Sequence[Task], folder: Folder, claims: Claims, options: Options, hooks: Hooks,
    watch: Watch,
) -> None:
    place, device = launch.place()
    maker = hooks.maker or PipelineMaker(command_line=options.command_line)
    if isinstance(maker, PipelineMaker) and options.device is None and device is not None:
        maker.device = device
    due = time.monotonic() + _INDEX_EVERY

    def passed() -> None:
        nonlocal due
        watch.look()
        begin = time.monotonic()
        if begin > due:
            index.write(folder, claims, wait=False)
            due = time.monotonic() + max(_INDEX_EVERY, 20 * (time.monotonic() - begin))

    left = [task for task in tasks if not folder.settled(task)]
    maker.check(left)
    if launch.parent() is not None:
        claims.on_beat.append(launch.leave_with_parent)
    Worker(left, folder, claims, maker, most=options.batch_size or MOST,
           fixed=options.batch_size is not None, place=place, stop=hooks.stop,
           on_step=hooks.on_step, on_pass=passed).run()
