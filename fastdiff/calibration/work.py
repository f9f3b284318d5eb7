"""Work: finished parts of a search on disk, so that a killed one goes on where it was."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """A folder of finished parts. None keeps them in memory only.

    settings: what the parts were made with; another search in the same folder is refused.
    """

    folder: Path | None
    settings: dict[str, Any]
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        now = json.loads(json.dumps(self.settings))
        # a search that ended before its first part binds nobody
        if not path.is_file() or not any(self.folder.glob("*.pt")):
            _atomic(path, lambda part: part.write_text(json.dumps(now)))
            return
        try:
            then = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{str(path)!r} is damaged, so it is not known what the parts beside "
                             "it were made with: --restart (or an empty folder) begins anew"
                             ) from None
        unlike = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if unlike:
            told = "; ".join(f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}"
                             for key in unlike)
            raise ValueError(f"{str(self.folder)!r} holds the unfinished search of other settings "
                             f"({told}): give the same ones to go on, or --restart to begin anew")

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part called `name`: read where it is finished, else made and kept."""
        if self.folder is None:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]
        path = self.folder / f"{name}.pt"
        if path.is_file():
            # a damaged one is made again
            with suppress(RuntimeError, EOFError, UnpicklingError):
                return torch.load(path, weights_only=True)
        found = make()
        _atomic(path, lambda part: torch.save(found, part))
        return found

    def leave(self) -> None:
        """The search broke off: a folder without a finished part goes."""
        if self.folder is not None and not any(self.folder.glob("*.pt")):
            (self.folder / "settings.json").unlink(missing_ok=True)
            # what else lies there is not ours
            with suppress(OSError):
                self.folder.rmdir()

    def done(self) -> None:
        """The search is finished: its parts go."""
        if self.folder is not None:
            shutil.rmtree(self.folder)


def _atomic(path: Path, fill: Callable[[Path], Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        fill(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
