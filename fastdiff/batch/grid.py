"""Many jobs from few words: a Cartesian grid, values for all, pictures by a pattern."""

import glob
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff import models
from fastdiff.batch.fields import PATHS, is_option
from fastdiff.batch.lines import Line, name_of
from fastdiff.cli.choice import STOCK
from fastdiff.cli.errors import InputError

MOST = 1_000_000


def expand(
    lines: Sequence[Line], grid: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any]
) -> list[Line]:
    """Every line with every combination of the grid; defaults fill what a line leaves open.

    What comes from the grid or the defaults is left out where it means nothing: options of a
    method where the method is stock, frames of a picture.
    """
    grid = {name_of(name): values for name, values in grid.items()}
    defaults = {name_of(name): value for name, value in defaults.items()}
    for name, values in grid.items():
        if not values:
            raise InputError(f"grid {name}: give at least one value")
        if name in defaults:
            raise InputError(f"{name} is both in the grid and set for all: leave one out")
        for line in lines:
            if name in line.fields:
                raise InputError(f"{line.where}: {name} is set here and in the grid: "
                                 "leave one out")
    count = len(lines)
    for values in grid.values():
        count *= len(values)
    if count > MOST:
        raise InputError(f"the grid makes {count} jobs: at most {MOST} in one call")
    made = []
    for line in lines:
        for chosen in itertools.product(*grid.values()):
            fields = {**defaults, **line.fields, **dict(zip(grid, chosen, strict=True))}
            fields = {name: value for name, value in fields.items()
                      if name in line.fields or _applies(name, fields)}
            made.append(Line(line.where, fields, line.home))
    return made


def _applies(name: str, fields: Mapping[str, Any]) -> bool:
    """Stock has no options, and a picture has one frame."""
    if name == "frames":
        picture = str(fields.get("video", "")).lower() in ("false", "no", "off", "0")
        return not picture and fields.get("kind") != "image"
    return fields.get("method") != STOCK or not is_option(name)


def grid_of(words: Sequence[str]) -> dict[str, list[Any]]:
    """{name: values} of `name=a,b,c`, or of `name=["a, b", "c"]` where a value has commas."""
    found: dict[str, list[Any]] = {}
    for word in words:
        name, text = _pair("--grid", word)
        if name in found:
            raise InputError(f"--grid gives {name} twice: put its values in one")
        if text.startswith("["):
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"--grid {name}: not a JSON list: {error}") from None
        else:
            values = [_from_here(name, part.strip()) for part in text.split(",")]
        if not all(isinstance(value, (str, int, float, bool)) and value != "" for value in values):
            raise InputError(f"--grid {word!r}: accepted is {name}=a,b,c without empty values")
        if len({json.dumps(value) for value in values}) < len(values):
            raise InputError(f"--grid {word!r} has a value twice")
        found[name] = values
    return found


def defaults_of(words: Sequence[str]) -> dict[str, Any]:
    """{name: value} of `name=value`."""
    found: dict[str, Any] = {}
    for word in words:
        name, text = _pair("--set", word)
        if name in found:
            raise InputError(f"--set gives {name} twice")
        found[name] = _from_here(name, text)
    return found


def images_of(pattern: str) -> list[str]:
    """The files that a glob names, sorted; absolute, so that they mean the same everywhere."""
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [str(Path(name).absolute()) for name in found if Path(name).is_file()]
    if not files:
        raise InputError(f"no file matches {pattern!r}")
    return files


def _from_here(name: str, text: str) -> str:
    """A path on the command line starts from where we stand, not from where the jobs stand."""
    path = Path(text).expanduser()
    here = name in PATHS and text not in models.shipped() and path.exists()
    return str(path.absolute()) if here else text


def _pair(option: str, word: str) -> tuple[str, str]:
    name, equals, text = word.partition("=")
    if not equals or not name.strip() or not text.strip():
        raise InputError(f"{option} {word!r} is not name=value")
    return name_of(name), text.strip()
