"""What things cost on this machine: measured once, kept in a file, asked before tokens are cut."""

import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

# calls in a row on a GPU
CALLS = 8
# a gain below this share is noise
MARGIN = 0.02


class Verdict(NamedTuple):
    """Seconds of one call, stock and ours."""

    stock: float
    ours: float

    @property
    def pays(self) -> bool:
        return self.ours < self.stock * (1 - MARGIN)

    def __str__(self) -> str:
        return f"{self.ours * 1e3:.2f} ms, stock {self.stock * 1e3:.2f} ms"


class Judge(Protocol):
    """Something that can be faster or not, depending on the sizes of a call."""

    def judge(self, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Verdict:
        """Measure or look up."""
        ...

    def told(self, sizes: tuple[int, ...], found: Verdict) -> None:
        """Take note of the answer."""
        ...


_numbers = itertools.count()
# a compiled graph can hold a number, not an object
_judges: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(judge: Judge) -> int:
    """The number under which `pays` finds this one; it lives as long as the object."""
    found = next(_numbers)
    _judges[found] = judge
    return found


@torch.compiler.assume_constant_result
def pays(judge: int, sizes: tuple[int, ...], device: str, dtype: str) -> bool:
    """Whether it is faster. Plain arguments: a graph asks once, while it is traced."""
    found = _judges[judge].judge(sizes, torch.device(device),
                                 getattr(torch, dtype.removeprefix("torch.")))
    _judges[judge].told(sizes, found)
    return found.pays


def verdict(
    what: str, device: torch.device, dtype: torch.dtype, stock: Callable[[], Callable[[], Any]],
    ours: Callable[[], Callable[[], Any]],
) -> Verdict:
    """Compare two computations on this machine. what: names the shapes; it is part of the key.

    stock, ours: make the tensors and return the function to time; only called when the file does
    not know the answer.
    """
    key = f"{_machine(device)}|{dtype}|{what}"
    known = _known()
    if key not in known:
        with torch.no_grad():
            known[key] = measure(stock(), ours(), device)
        _keep(key, known[key])
    return known[key]


def measure(
    stock: Callable[[], Any], ours: Callable[[], Any], device: torch.device, repeats: int = 7
) -> Verdict:
    """Time both in turn, after two rounds each that warm up; fewer turns where one takes long.

    On a GPU calls follow each other as in a forward, where the host runs ahead: so a side for which
    the host takes longer than the GPU is as slow as the host. The least of each counts: other work
    on the machine only ever adds to a time, and adds to one side more than to the other.
    """
    calls = 1 if device.type == "cpu" else CALLS

    def seconds(run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        return (time.perf_counter() - begin) / calls

    for _ in range(2):
        once = max(seconds(stock), seconds(ours))
    long = once * calls > 0.3
    turns = [(seconds(stock), seconds(ours)) for _ in range(3 if long else repeats)]
    return Verdict(*map(min, zip(*turns, strict=True)))


def cache_folder() -> Path:
    """FASTDIFF_CACHE, or the user's cache folder of this platform."""
    if os.environ.get("FASTDIFF_CACHE"):
        return Path(os.environ["FASTDIFF_CACHE"])
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastdiff"


def forget() -> None:
    """Measure everything anew from now on; the file stays."""
    _known.cache_clear()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {os.cpu_count()} cores {torch.get_num_threads()} threads"
    return f"{name}|torch {torch.__version__}"


def _file() -> Path:
    return cache_folder() / "costs-3.json"


@functools.cache
def _known() -> dict[str, Verdict]:
    return _read()


def _read() -> dict[str, Verdict]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: Verdict(*map(float, pair)) for key, pair in found.items() if _is_pair(pair)}


def _is_pair(found: Any) -> bool:
    return (isinstance(found, list) and len(found) == 2
            and all(isinstance(value, (int, float)) and value > 0 for value in found))


def _keep(key: str, value: Verdict) -> None:
    """Add one line to the file; another process may have added others. A lost line costs time."""
    path = _file()
    content = json.dumps({**_read(), key: value}, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".part",
                                         encoding="utf-8") as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:  # a read-only home: measured again in the next process
        return
