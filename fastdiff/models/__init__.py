"""The models that ship with the package, their defaults, and loading any model by its name."""

import difflib
import hashlib
import json
import re
import textwrap
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from . import packed

__all__ = ["Defaults", "Model", "defaults", "find", "load", "shipped"]

HOME = Path(__file__).parent
INDEX = "model_index.json"
DEFAULTS = "fastdiff.json"
FIRST = "tiny-video"
# what from_pretrained reads; a model card or a picture beside it changes nothing
LOADED = (".json", ".safetensors", ".bin", ".txt", ".model")


@dataclass(frozen=True)
class Defaults:
    """What a model makes best; None leaves the pipeline's own default in place.

    kind: what it makes, the usual one first. multiple: height and width are multiples of it.
    frames_rule: legal frame counts, such as "4n+1". call: more arguments for the pipeline's call.
    """

    kind: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance: float | None = None
    max_sequence_length: int | None = None
    multiple: int | None = None
    frames_rule: str | None = None
    summary: str = ""
    license: str = ""
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def frame_factor(self) -> int | None:
        """n of "n * k + 1"."""
        rule = re.fullmatch(r"(\d+)\s*n\s*\+\s*1", self.frames_rule or "")
        return int(rule.group(1)) if rule else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that the user never types."""
        text = self.max_sequence_length
        return {**self.call, **({} if text is None else {"max_sequence_length": text})}


@dataclass(frozen=True)
class Model:
    """A model that was asked for. folder: None for a hub id."""

    name: str
    folder: Path | None = None
    shipped: bool = False

    @cached_property
    def defaults(self) -> Defaults:
        return Defaults() if self.folder is None else _read_defaults(self.folder / DEFAULTS)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self._files())

    @cached_property
    def sha256(self) -> str:
        """Content hash over names and bytes of all files that decide a result."""
        digest = hashlib.sha256()
        for path in (path for path in self._files() if path.suffix in LOADED):
            if path.name == DEFAULTS:
                continue
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            name = path.relative_to(self.folder or HOME).as_posix()
            digest.update(f"{name} {content}\n".encode())
        return digest.hexdigest()

    def _files(self) -> list[Path]:
        if self.folder is None:
            return []
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return sorted(path for path in found if "__pycache__" not in path.parts)


def shipped() -> dict[str, Model]:
    """The models inside the package, by name."""
    folders = sorted(path.parent for path in HOME.glob(f"*/{INDEX}"))
    return {folder.name: Model(folder.name, folder, shipped=True) for folder in folders}


def find(name: str | Path) -> Model:
    """A shipped name, a pipeline folder, or a hub id; a ValueError that names the nearest."""
    text = str(name)
    known = shipped()
    if text in known:
        return known[text]
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise ValueError(f"{text!r} is not a diffusers pipeline folder: it has no {INDEX}")
        return Model(str(folder.resolve()), folder.resolve())
    if text == FIRST:
        raise ValueError(f"the weights of {FIRST!r} are not in this installation: pass --model")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "/", "~")):
        raise ValueError(f"unknown model {text!r}: {_nearest(text, list(known))}")
    return Model(text)


def defaults(name: str | Path) -> Defaults:
    """What a model makes best: the `fastdiff.json` in its folder; nothing for a hub id."""
    return find(name).defaults


def load(
    name: str | Path | Model, device: str = "cpu", dtype: Any = None, safetensors: bool = False
) -> Any:
    """The pipeline of a shipped name, a folder or a hub id, on `device`.

    dtype: a torch dtype or its name; None is bfloat16 on a GPU and float32 on a CPU.
    safetensors: refuse weights in any other form, because unpickling may run code.
    """
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    model = name if isinstance(name, Model) else find(name)
    if dtype is None:
        dtype = torch.float32 if str(device) == "cpu" else torch.bfloat16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    settings = {_dtype_argument(): dtype, **({"use_safetensors": True} if safetensors else {})}
    if model.folder is not None:
        parts = _own_parts(model.folder, dtype)
        pipe = DiffusionPipeline.from_pretrained(
            model.folder, local_files_only=True, **parts, **settings)
        return pipe.to(device)
    try:
        pipe = DiffusionPipeline.from_pretrained(model.name, **settings)
    except Exception as error:  # the hub client raises a dozen kinds
        if not _is_fetch_error(error):
            raise
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise ValueError(
            f"model {model.name!r} is neither a shipped name ({', '.join(shipped()) or 'none'}) "
            f"nor a local folder, and could not be fetched from the hub: {reason}"
        ) from error
    return pipe.to(device)


def _own_parts(folder: Path, dtype: Any) -> dict[str, Any]:
    """Components with packed weights, and those that another shipped model lends."""
    from importlib import import_module

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    lent = _read_json(folder / DEFAULTS).get("parts", {})
    found = {}
    for name, about in index.items():
        if not isinstance(about, list) or about[0] is None:
            continue
        home = HOME / lent[name] / name if name in lent else folder / name
        if name in lent or any(home.glob("*" + packed.ENDING)):
            kind = getattr(import_module(about[0]), about[1])
            part = packed.load_part(home, kind, dtype)
            found[name] = part if part is not None else kind.from_pretrained(
                home, local_files_only=True, **{_dtype_argument(): dtype})
    return found


def _is_fetch_error(error: Exception) -> bool:
    home = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, ValueError)) or home in (
        "huggingface_hub", "requests", "urllib3", "httpx", "httpcore")


def _dtype_argument() -> str:
    from diffusers.utils import deprecation_utils

    # diffusers before the rename knows only torch_dtype
    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def _read_defaults(path: Path) -> Defaults:
    found = _read_json(path)
    known = {f.name for f in fields(Defaults)}
    given = {key: value for key, value in found.items() if key in known}
    if "kind" in given:
        kind = given["kind"]
        given["kind"] = (kind,) if isinstance(kind, str) else tuple(kind)
    return Defaults(**given)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    names = f"a shipped name ({', '.join(known) or 'none is installed'})"
    return f"{hint}Accepted: {names}, a folder with {INDEX}, or a hub id such as owner/name"
