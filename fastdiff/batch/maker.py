"""From tasks to frames, and from frames to files: what a worker does on the device."""

import gc
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fastdiff import models
from fastdiff.batch.folder import now
from fastdiff.batch.task import Task
from fastdiff.cli import output, sampling, sidecar
from fastdiff.cli.errors import InputError
from fastdiff.cli.job import fit, load, switch
from fastdiff.cli.sampling import OnStep
from fastdiff.cli.show import Show
from fastdiff.cli.sidecar import Settings

Load = Callable[[models.Model, Settings, Show], Any]


@dataclass(frozen=True)
class Made:
    """What came out for one task. content: what `write` needs. together, seconds: of its call."""

    task: Task
    content: Any
    together: int
    seconds: float

    def about(self) -> dict[str, Any]:
        """The part of a sidecar that a batch adds."""
        return {"id": self.task.id, "where": self.task.where, "group": self.task.group,
                "size": self.together, "seconds": self.seconds, "image": self.task.image,
                "image_sha256": self.task.image_sha256, "when": now(),
                "worker": f"{socket.gethostname()} {os.getpid()}"}


class Maker(Protocol):
    """What a worker drives. `make` runs on the main thread, `write` on another one."""

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse, before the first one runs, what can only be known with the model loaded."""
        ...

    def make(self, tasks: Sequence[Task], on_step: OnStep) -> list[Made | Exception]:
        """Run tasks of one group in one call; what came out wrong is an error in its place."""
        ...

    def write(self, made: Made, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Write one result; its path, and its sidecar for the caller to write last."""
        ...

    def recover(self) -> None:
        """Free what an error left behind on the device."""
        ...


@dataclass
class _Content:
    settings: Settings
    frames: Any
    seconds: float
    report: dict[str, Any] | None


@dataclass
class PipelineMaker:
    """Makes tasks with diffusers pipelines; one is loaded at a time, and stays.

    device: in place of the one in a task's settings. load: another way to get a pipeline.
    """

    device: str | None = None
    show: Show = field(default_factory=lambda: Show(quiet=True))
    command_line: Sequence[str] = ()
    load: Load = load
    _pipe: Any = None
    _loaded: str | None = None
    _switched: Any = None
    _fitted: dict[tuple[Any, ...], Settings] = field(default_factory=dict)

    def check(self, tasks: Sequence[Task]) -> None:
        """Fit every task of the model that comes first."""
        for task in tasks:
            if task.model_key == tasks[0].model_key:
                try:
                    self._fit(task)
                except InputError as error:
                    raise InputError(f"{task.where}: {error}") from error

    def make(self, tasks: Sequence[Task], on_step: OnStep) -> list[Made | Exception]:
        several = [self._fit(task) for task in tasks]
        self._switch(several[0])
        more = {} if tasks[0].image is None else {"image": _open(tasks[0].image)}
        results = sampling.sample_together(self._pipe, several, on_step, **more)
        report = None
        if several[0].plan is not None:
            report = self._pipe.fastdiff.report.summary()
        made: list[Made | Exception] = []
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, Exception):
                made.append(result)
                continue
            content = _Content(result.settings, result.frames, result.seconds, report)
            made.append(Made(task, content, len(tasks), result.seconds * len(tasks)))
        return made

    def write(self, made: Made, folder: Path) -> tuple[Path, dict[str, Any]]:
        content: _Content = made.content
        settings = content.settings
        path = folder / f"{made.task.stem}{output.SUFFIX[settings.kind]}"
        model = models.find(settings.model)
        record = sidecar.record(path, settings, model, self._pipe, content.seconds,
                                content.report, self.command_line)
        about = {**settings.to_dict(), "model_sha256": record["model_sha256"],
                 "versions": record["versions"]}
        output.write(path, content.frames, settings.fps, about)
        return path, {**record, "batch": made.about()}

    def recover(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fit(self, task: Task) -> Settings:
        settings = task.settings
        if self.device is not None:
            settings = replace(settings, device=self.device)
        self._have(task.model_key, settings)
        key = (task.group, task.typed, settings.device)
        if key not in self._fitted:
            supplied = frozenset() if task.image is None else frozenset({"image"})
            self._fitted[key] = fit(self._pipe, settings, frozenset(task.typed), supplied)
        return replace(self._fitted[key], prompt=settings.prompt, negative=settings.negative,
                       seed=settings.seed, method=settings.method)

    def _have(self, key: str, settings: Settings) -> None:
        """Load the pipeline, unless it is; the one before goes first, for its memory."""
        if self._loaded == key:
            return
        self._pipe = self._loaded = self._switched = None
        self._fitted.clear()
        self.recover()
        self._pipe = self.load(models.find(settings.model), settings, self.show)
        self._loaded = key

    def _switch(self, settings: Settings) -> None:
        wanted = (settings.plan, settings.strict)
        if self._switched != wanted:
            self._switched = None
            switch(self._pipe, settings)
            self._switched = wanted


def _open(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")
