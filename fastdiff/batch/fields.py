"""The fields of a line: every setting of `fastdiff generate`, and the knobs of every method."""

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff import models
from fastdiff.batch.lines import Line
from fastdiff.cli import values
from fastdiff.cli.errors import InputError, nearest
from fastdiff.cli.job import Job

FIELDS = ("prompt", "negative", "model", "kind", "video", "seed", "steps", "guidance", "size",
          "height", "width", "frames", "fps", "dtype", "offload", "strict", "method", "plan",
          "image", "option")
# fields that name a file or a folder
PATHS = ("model", "plan", "image")
_TYPES: dict[str, type] = {
    "seed": int, "steps": int, "guidance": float, "height": int, "width": int, "frames": int,
    "fps": int, "offload": bool, "strict": bool, "video": bool,
}
_LEAST = {"seed": 0, "steps": 1, "height": 1, "width": 1, "frames": 1, "fps": 1}
_MOST_SEED = 2**63 - 1
_KINDS = ("video", "image")
_ELSEWHERE = {
    "device": "the device is the same for all jobs: --device",
    "compare": "to compare, make both: --grid method=stock,balanced",
    "output": "names come from the content of a job, in the folder of --output",
    "overwrite": "a job that has its result is not made again; delete the result to repeat it",
    "from": "write the settings of that sidecar as fields",
}


@cache
def knobs() -> frozenset[str]:
    """Options of all methods, by name."""
    from dataclasses import fields

    from fastdiff.config import methods

    return frozenset(f.name for method in methods().values() for f in fields(method))


def is_option(name: str) -> bool:
    """Whether a field is a knob of some method, "knob" or "method.knob"."""
    return name not in FIELDS and ("." in name or name in knobs())


def job_of(line: Line, device: str | None) -> tuple[Job, Path | None]:
    """What `fastdiff generate` would be asked for, and the picture to start from."""
    given: dict[str, Any] = {}
    options: dict[str, str] = {}
    words: dict[str, str] = {}
    for name, value in line.fields.items():
        if value is None or value == "":
            continue
        if name == "option":
            options.update(_options(value))
        elif name in _TYPES:
            given[name] = _number(name, value)
        elif name in FIELDS:
            words[name] = values.writable(name, _word(name, value))
        elif "." in name or name in knobs():
            options[name] = values.writable(name, _text(value))
        else:
            raise InputError(_unknown(name))
    if not words.get("prompt"):
        raise InputError("there is no prompt")
    kind = _kind(words.get("kind"), given.pop("video", None))
    if "size" in words:
        if "height" in given or "width" in given:
            raise InputError("give either size, or height and width")
        given["height"], given["width"] = values.size(words["size"])
    if "dtype" in words:
        given["dtype"] = values.dtype(words["dtype"])
    if "negative" in words:
        given["negative"] = words["negative"]
    plan = line.home / Path(words["plan"]).expanduser() if "plan" in words else None
    image = line.home / Path(words["image"]).expanduser() if "image" in words else None
    job = Job(prompts=[words["prompt"]], model=_model(words.get("model"), line.home), kind=kind,
              method=words.get("method"), plan_file=plan, options=options, device=device,
              given=given)
    return job, image


def _model(name: str | None, home: Path) -> str | None:
    """A folder beside the file that names it, else the name as it is."""
    if name is None or name in models.shipped():
        return name
    beside = home / Path(name).expanduser()
    return str(beside) if beside.is_dir() else name


def _kind(kind: str | None, video: bool | None) -> str | None:
    if kind is not None and kind not in _KINDS:
        raise InputError(f"kind={kind!r}: accepted is {' or '.join(_KINDS)}")
    told = None if video is None else "video" if video else "image"
    if kind and told and kind != told:
        raise InputError(f"kind={kind!r} contradicts video={json.dumps(video)}")
    return kind or told


def _number(name: str, value: Any) -> Any:
    found = values.typed(name, _text(value), _TYPES[name])
    if isinstance(found, float) and not math.isfinite(found):
        raise InputError(f"{name}={_text(value)}: accepted is a finite number")
    if name in _LEAST and found < _LEAST[name]:
        raise InputError(f"{name}={found}: accepted is {_LEAST[name]} or more")
    if name == "seed" and found > _MOST_SEED:
        raise InputError(f"seed={found}: accepted is at most {_MOST_SEED}")
    return found


def _word(name: str, value: Any) -> str:
    if name == "size" and isinstance(value, (list, tuple)) and len(value) == 2:
        return f"{_word(name, value[0])}x{_word(name, value[1])}"
    if name == "size" and isinstance(value, (int, float)):
        value = _text(value)
    if name == "size" and isinstance(value, str):
        # as in a column with empty cells
        value = re.sub(r"\.0+(?=\D|$)", "", value)
    if not isinstance(value, (str, Path)):
        raise InputError(f"{name} is text, not {_text(value)}")
    return str(value).strip()


def _options(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(name).replace("-", "_"): values.writable(str(name), _text(of))
                for name, of in value.items()}
    several = value if isinstance(value, (list, tuple)) else str(value).split(";")
    return dict(values.pair(str(text)) for text in several)


def _text(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (list, tuple)):
        return ",".join(_text(part) for part in value)
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise InputError(f"{value!r} is not a value: accepted are text, numbers, yes or no")


def _unknown(name: str) -> str:
    if name in _ELSEWHERE:
        return f"{name} is no field of a line: {_ELSEWHERE[name]}"
    close = nearest(name, [*FIELDS, *sorted(knobs())])
    return f"unknown field {name!r}: {close}"
