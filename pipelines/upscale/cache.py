"""Where the guide's text attention waits for the steps that use it again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# device: beside the model; host: in main memory; 8-bit: a byte a number; none: the guide every step
PLACES = ("device", "host", "device-8-bit", "host-8-bit", "none")
# room that a forward needs besides, in outputs of one layer: the feed-forward holds about so many
_ROOM = 32
_SPARE = 2 << 30

Entry = tuple[Tensor, ...]


class Whole(NamedTuple):
    """An entry as it is, here or in main memory."""

    parts: Entry


class Bytes(NamedTuple):
    """An entry whose first tensor is int8, with a float32 scale for each vector of its last axis.

    parts: (int8, scale, the other tensors as they are).
    """

    parts: Entry
    dtype: torch.dtype


class GuideCache:
    """Outputs of the guide branch by layer; several tensors each, [rows, S, ...].

    place: one of PLACES, or "auto": the first of them with room for all layers.
    tell: told in words where it went.
    """

    def __init__(self, place: str, tell: Callable[[str], None]) -> None:
        self.place = place
        self._tell = tell
        self._kept: dict[int, Whole | Bytes] = {}
        self._order: list[int] = []
        self._coming: dict[int, tuple[Entry, torch.cuda.Event]] = {}
        self._side: torch.cuda.Stream | None = None
        self._told = False

    @property
    def keeps(self) -> bool:
        return self.place != "none"

    def holds(self, key: int) -> bool:
        return key in self._kept

    def clear(self) -> None:
        self._kept.clear()
        self._order.clear()
        self._coming.clear()

    def drop(self, keys: set[int]) -> None:
        """Forget these layers."""
        self._coming.clear()
        self._order = [key for key in self._order if key not in keys]
        for key in keys & self._kept.keys():
            del self._kept[key]

    def settle(self, entry: Entry, layers: int) -> None:
        """Choose the place, knowing one layer's entry and how many there are."""
        one = sum(x.numel() * x.element_size() for x in entry)
        if self.place == "auto":
            room = free_memory(entry[0].device)
            self.place = choose_place(one, layers, entry[0].element_size(), *room)
        if not self._told:
            self._told = True
            size = one * layers / 2**30
            if "8-bit" in self.place:
                size /= entry[0].element_size()
            self._tell("none: the guide runs in every step" if self.place == "none"
                       else f"{self.place}, {size:.2g} GiB")

    def put(self, key: int, entry: Entry) -> None:
        """Keep an entry; one that is there already is replaced in its own memory where it can."""
        if not self.keeps:
            return
        if key not in self._kept:
            self._order.append(key)
        host = self.place.startswith("host") and entry[0].is_cuda
        self._coming.pop(key, None)
        held = self._kept.get(key)
        old = None if held is None else held.parts
        if not self.place.endswith("8-bit"):
            self._kept[key] = Whole(_to_host(entry, old) if host else tuple(map(_alone, entry)))
            return
        packed = (*_pack(entry[0]), *entry[1:])
        self._kept[key] = Bytes(_to_host(packed, old) if host else packed, entry[0].dtype)

    def get(self, key: int, device: torch.device) -> Entry:
        entry = self._fetch(key, device)
        if device.type == "cuda" and self.place.startswith("host"):
            self._prefetch(key, device)
        return entry

    def _fetch(self, key: int, device: torch.device) -> Entry:
        if key in self._coming:
            entry, ready = self._coming.pop(key)
            stream = torch.cuda.current_stream(device)
            stream.wait_event(ready)
            for x in entry:
                x.record_stream(stream)
            return entry
        return self._bring(self._kept[key], device)

    def _bring(self, held: Whole | Bytes, device: torch.device) -> Entry:
        parts = tuple(x.to(device, non_blocking=True) for x in held.parts)
        if isinstance(held, Whole):
            return parts
        return (_unpack(parts[0], parts[1], held.dtype), *parts[2:])

    def _prefetch(self, key: int, device: torch.device) -> None:
        """Begin to bring the next layer while this one is computed."""
        at = self._order.index(key) + 1
        if at >= len(self._order) or self._order[at] in self._coming:
            return
        if self._side is None:
            self._side = torch.cuda.Stream(device)
        following = self._order[at]
        # what it brings may still be on its way to main memory
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            entry = self._bring(self._kept[following], device)
            ready = torch.cuda.Event()
            ready.record(self._side)
        self._coming[following] = (entry, ready)


def choose_place(one: int, layers: int, element: int, device: float, host: float) -> str:
    """The first of PLACES with room for `layers` entries of `one` bytes.

    element: bytes of a number. device, host: free bytes.
    """
    room = {"device": device - _ROOM * one - _SPARE, "host": host - _SPARE}
    for place in PLACES[:-1]:
        size = one * layers / (element if place.endswith("8-bit") else 1)
        if size <= room[place.partition("-")[0]]:
            return place
    return "none"


def free_memory(device: torch.device) -> tuple[float, float]:
    """Free bytes of (the device, main memory); on a CPU both are main memory."""
    host = _free_host()
    if device.type != "cuda":
        # the room for a forward is taken off there
        return host, host
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + held, host


def _free_host() -> float:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # not known, as on Windows: no reason to refuse
    return float("inf")


def _to_host(entry: Entry, old: Entry | None) -> Entry:
    fits = old is not None and all(a.shape == b.shape for a, b in zip(old, entry, strict=True))
    # main memory that the GPU reads by itself; slow to get, so it is used again
    held = old if fits and old is not None else tuple(
        torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in entry)
    for target, x in zip(held, entry, strict=True):
        target.copy_(x, non_blocking=True)
    return held


def _alone(x: Tensor) -> Tensor:
    """x, and not a part of a larger tensor that would stay in memory with it."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def _pack(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


def _unpack(small: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (small * scale).to(dtype)
