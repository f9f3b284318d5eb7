"""A task: one job with every setting resolved, named by a hash of what decides its result."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff import models
from fastdiff.batch.fields import job_of
from fastdiff.batch.lines import Line
from fastdiff.cli import output, sampling
from fastdiff.cli.errors import InputError
from fastdiff.cli.sidecar import Settings

# settings that change how a result is made, and not what it shows
_NOT_CONTENT = ("device", "offload", "strict", "method")
_SAMPLES, _SAMPLE = 64, 4096


@dataclass(frozen=True)
class Task:
    """One result to make.

    id: from the content. stem: of the file names. group: tasks of one group can run in one call
    of the pipeline. typed: settings that were given a value. image: a picture to start from.
    """

    id: str
    stem: str
    group: str
    settings: Settings
    where: str
    typed: tuple[str, ...] = ()
    image: str | None = None
    image_sha256: str | None = None

    @property
    def model_key(self) -> str:
        """Tasks that share it share a loaded pipeline."""
        return f"{self.settings.model} {self.settings.dtype} {self.settings.offload}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "Task":
        fields = {**content, "settings": Settings(**content["settings"]),
                  "typed": tuple(content["typed"])}
        return Task(**fields)


@dataclass
class Planner:
    """From lines to tasks, all checks that need no weights included."""

    device: str | None = None
    _resolved: dict[str, Settings] = field(default_factory=dict)

    def plan(self, lines: Iterable[Line]) -> list[Task]:
        """A task for each line; those of the same content are equal but for where they stand.

        Raises an InputError that names file and line.
        """
        found: list[Task] = []
        content: dict[str, str] = {}
        for line in lines:
            try:
                task, words = self._task(line)
            except (InputError, ValueError, OSError) as error:
                raise InputError(f"{line.where}: {error}") from error
            if content.setdefault(task.id, words) != words:
                raise InputError(f"{line.where}: two different jobs have the name {task.id}; "
                                 "change the seed of one")
            found.append(task)
        return found

    def _task(self, line: Line) -> tuple[Task, str]:
        job, picture = job_of(line, self.device)
        own = {name: job.given[name] for name in ("seed", "negative") if name in job.given}
        shared = {name: value for name, value in job.given.items() if name not in own}
        key = repr((job.model, job.kind, job.method, job.plan_file, job.options, shared))
        if key not in self._resolved:
            model = models.find(job.model or models.FIRST)
            alike = replace(job, given=shared).settings(model)
            sampling.check_size(alike, model.defaults.multiple, model.defaults.frame_factor)
            if alike.kind == "video":
                output.check_ffmpeg()
            _check_class(model, alike, job.typed, picture is not None)
            self._resolved[key] = alike
        settings = replace(self._resolved[key], prompt=job.prompts[0], **own)
        sha256 = None if picture is None else _picture(picture)
        words = _canonical(settings, sha256)
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        stem = f"{output.slug(settings.prompt, 40)}-seed{settings.seed}-{digest}"
        return Task(digest, stem, _group(settings, sha256), settings, line.where,
                    tuple(sorted(job.typed)), None if picture is None else str(picture),
                    sha256), words


def _canonical(settings: Settings, image: str | None) -> str:
    """Everything that decides the result, as text."""
    content = {name: value for name, value in settings.to_dict().items()
               if name not in _NOT_CONTENT}
    if settings.kind == "image":
        content.pop("fps")
    model = fingerprint(settings.model)
    return json.dumps({**content, "model": model, "image": image}, sort_keys=True)


def _group(settings: Settings, image: str | None) -> str:
    alike = {name: value for name, value in settings.to_dict().items()
             if name not in ("prompt", "seed", "negative", "method")}
    # a prompt without a negative one cannot share a list of them; nor can pictures to start from
    alike |= {"negative": settings.negative is not None, "image": image}
    return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:12]


def distinct(tasks: Iterable[Task]) -> list[Task]:
    """The first task of each content."""
    found: dict[str, Task] = {}
    for task in tasks:
        found.setdefault(task.id, task)
    return list(found.values())


@cache
def fingerprint(name: str) -> str:
    """What tells one model from another of the same name: the content of a shipped one.

    Of another folder: names, sizes and samples of its files, since weights can take minutes to
    read. Of a hub id: the id.
    """
    model = models.find(name)
    if model.shipped:
        return model.sha256
    if model.folder is None:
        return name
    digest = hashlib.sha256()
    for path in sorted(path for path in model.folder.rglob("*") if path.suffix in models.LOADED):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model.folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(size - _SAMPLE, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


@cache
def _picture(path: Path) -> str:
    """The content hash of a picture that can be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.verify()
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise InputError(f"the picture {str(path)!r} does not exist") from None
    except (UnidentifiedImageError, SyntaxError):
        raise InputError(f"{str(path)!r} is no picture that can be read") from None


def _check_class(
    model: models.Model, settings: Settings, typed: set[str], has_image: bool
) -> None:
    """Refuse what the pipeline's class has no argument for; the class needs no weights."""
    index = None if model.folder is None else model.folder / models.INDEX
    if index is None:
        return
    import diffusers

    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if cls is None:
        return
    sampling.check_pipeline(object.__new__(cls), settings, typed,
                            frozenset({"image"}) if has_image else frozenset())
