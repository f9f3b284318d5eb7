"""The JSON beside each result: everything needed to make it again."""

import importlib.metadata
import json
import platform
import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdiff.cli.errors import InputError
from fastdiff.models import Model

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What decides a result; None leaves the pipeline's default in place.

    method: as asked for. plan: the method with all its options; None is stock. call: more
    arguments of the pipeline's call.
    """

    prompt: str
    negative: str | None
    model: str
    kind: str
    method: str
    plan: dict[str, Any] | None
    seed: int
    steps: int | None
    guidance: float | None
    height: int | None
    width: int | None
    frames: int | None
    fps: int
    dtype: str
    device: str
    offload: bool = False
    strict: bool = False
    call: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(path: Path) -> dict[str, Any]:
    """The content of a sidecar."""
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise InputError(f"the sidecar {str(path)!r} does not exist") from None


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    """The content of a sidecar from its text. name: for the errors."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{name!r} is not JSON; --from takes the .json beside a result"
                         ) from None
    if not isinstance(content, dict) or content.get("fastdiff_sidecar") != VERSION:
        raise InputError(f"{name!r} is not a sidecar of fastdiff generate")
    missing = [f.name for f in fields(Settings) if f.name not in content]
    if missing:
        raise InputError(f"the sidecar {name!r} lacks {', '.join(missing)}")
    for setting, hint in typing.get_type_hints(Settings).items():
        if not _is(content[setting], hint):
            raise InputError(f"the sidecar {name!r} has {setting}={content[setting]!r}: that is "
                             "of the wrong type")
    return content


def _is(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    return isinstance(value, tuple(plain)) or (isinstance(value, int) and float in plain)


def versions() -> dict[str, str | None]:
    """What this process runs on; None is not installed."""
    from fastdiff import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "fastdiff": __version__}
    for name in ("torch", "diffusers", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def record(
    path: Path, settings: Settings, model: Model, pipe: Any, seconds: float,
    report: dict[str, Any] | None, command_line: Sequence[str],
) -> dict[str, Any]:
    """The content of a sidecar. report: what attention did; None for stock."""
    return {
        "fastdiff_sidecar": VERSION,
        "file": path.name,
        **settings.to_dict(),
        "model_sha256": model.sha256 if model.shipped else None,
        "pipeline": type(pipe).__name__,
        "seconds": seconds,
        "report": report,
        "versions": versions(),
        "command_line": shlex.join(["fastdiff", *command_line]),
    }


def differences(before: dict[str, Any], sha256: str | None) -> list[str]:
    """What is no longer as it was when the sidecar was written, and may change the result."""
    now, then = versions(), before.get("versions", {})
    found = [f"{name} was {then.get(name)} and is {version}" for name, version in now.items()
             if name != "python" and then.get(name) != version]
    if before.get("model_sha256") not in (None, sha256):
        found.append("the weights of the model differ")
    return found
