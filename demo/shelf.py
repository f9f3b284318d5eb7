"""Shelf: the files of finished results, each visitor's own, bounded, in a private folder."""

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdiff.cli import output, sidecar
from fastdiff.demo import likeness
from fastdiff.demo.render import Made, Renderer
from fastdiff.demo.wish import Wish

PREFIX = "fastdiff-demo-"
HOLD = 600  # seconds that a page may take to fetch its result, or to come back
_PAGES = 10_000


@dataclass(frozen=True)
class Entry:
    """One finished result. files: paths by what they show: fast, stock, difference, settings.

    user: the token of a browser, or the page where there is none.
    facts: figures of the comparison; None where there is no stock result.
    """

    key: str
    user: str
    wish: Wish
    files: dict[str, Path]
    record: dict[str, Any]
    facts: dict[str, Any] | None
    table: dict[str, Any] | None
    told: str
    made: float = field(default_factory=time.time)

    @property
    def settings(self) -> sidecar.Settings:
        return sidecar.Settings(**{f.name: self.record[f.name] for f in fields(sidecar.Settings)})


class Shelf:
    """Keeps the last `most` results; the oldest one's files are deleted first.

    A result is held until its page has it, however many come in between.
    """

    def __init__(self, most: int) -> None:
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._most = most
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._held: set[str] = set()
        self._rooms: OrderedDict[str, Path] = OrderedDict()
        # tokens of browsers by their open pages, and since when those without one are away
        self._pages: OrderedDict[str, str] = OrderedDict()
        self._away: dict[str, float] = {}
        self._lock = threading.Lock()

    def put(self, user: str, made: Made, renderer: Renderer) -> Entry:
        """Write the files of a result, with the settings inside."""
        key = secrets.token_urlsafe(12)
        folder = self.folder / key
        folder.mkdir(mode=0o700)
        try:
            entry = _write(folder, key, self._pages.get(user, user), made, renderer)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._entries[key] = entry
            self._held.add(key)
        return entry

    def release(self, key: str) -> None:
        """The page has it now: it counts, and the oldest that count too many are deleted."""
        with self._lock:
            self._held.discard(key)
            long_ago = time.time() - HOLD
            free = [key for key, entry in self._entries.items()
                    if key not in self._held or entry.made < long_ago]
            old = [self._entries.pop(key) for key in free[:max(0, len(free) - self._most)]]
            self._held.intersection_update(self._entries)
        for entry in old:
            shutil.rmtree(self.folder / entry.key, ignore_errors=True)

    def room(self, user: str) -> Path:
        """A new folder for the files of a batch; a user's next one replaces it."""
        with self._lock:
            old = self._rooms.pop(user, None)
            room = self._rooms[user] = self.folder / f"batch-{secrets.token_urlsafe(12)}"
            gone = [old] if old else []
            while len(self._rooms) > max(1, self._most // 10):
                gone.append(self._rooms.popitem(last=False)[1])
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        room.mkdir(mode=0o700)
        return room

    def of(self, user: str) -> list[Entry]:
        """The results of a visitor, the last one first."""
        with self._lock:
            owner = self._pages.get(user, user)
            return [entry for entry in reversed(self._entries.values()) if entry.user == owner]

    def welcome(self, user: str, token: Any) -> str:
        """A page begins. token: what its browser kept, checked. Returns what it is to keep."""
        self._drop_long_away()
        with self._lock:
            known = token in (*self._pages.values(), *self._away)
            owner = self._pages[user] = token if known else secrets.token_urlsafe(16)
            self._away.pop(owner, None)
            if len(self._pages) > _PAGES:
                self._pages.popitem(last=False)
            return owner

    def forget(self, user: str) -> None:
        """A page was closed: its results go, after a while where its browser may come back."""
        with self._lock:
            room = self._rooms.pop(user, None)
            owner = self._pages.pop(user, None)
            if owner is not None and owner not in self._pages.values():
                self._away[owner] = time.time()
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
        if owner is None:
            self._delete(user)
        self._drop_long_away()

    def _drop_long_away(self) -> None:
        with self._lock:
            gone = [owner for owner, since in self._away.items() if since < time.time() - HOLD]
            for owner in gone:
                del self._away[owner]
        for owner in gone:
            self._delete(owner)

    def _delete(self, owner: str) -> None:
        with self._lock:
            keys = [entry.key for entry in self._entries.values() if entry.user == owner]
            for key in keys:
                del self._entries[key]
        for key in keys:
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(folder: Path, key: str, user: str, made: Made, renderer: Renderer) -> Entry:
    settings = made.settings
    suffix = output.SUFFIX[settings.kind]
    stem = f"{output.slug(settings.prompt)}-seed{settings.seed}"
    files = {"fast": folder / f"{stem}{suffix}", "settings": folder / f"{stem}{suffix}.json"}
    record = sidecar.record(files["fast"], settings, renderer.model, renderer.pipe,
                            made.fast.seconds, made.report, ["demo"])
    about = {**settings.to_dict(), "model_sha256": record["model_sha256"],
             "versions": record["versions"]}
    facts = None
    if made.stock is not None:
        map_, top = likeness.difference(made.stock.frames, made.fast.frames)
        facts = _facts(made, top)
        record["compare"] = facts
        files["stock"] = folder / f"{stem}-stock{suffix}"
        files["difference"] = folder / f"{stem}-difference{suffix}"
        output.write(files["stock"], made.stock.frames, settings.fps,
                     {**about, "method": "stock", "plan": None})
        output.write(files["difference"], map_, settings.fps, about)
    output.write(files["fast"], made.fast.frames, settings.fps, about)
    output.write_json(files["settings"], record)
    return Entry(key, user, made.wish, files, record, facts, made.table, made.told)


def _facts(made: Made, top: float) -> dict[str, Any]:
    assert made.stock is not None
    near = output.psnr(made.stock.frames, made.fast.frames)
    return {
        "stock_seconds": made.stock.seconds,
        "speedup": made.stock.seconds / made.fast.seconds,
        "psnr": None if near == float("inf") else near,
        "ssim": likeness.ssim(made.stock.frames, made.fast.frames),
        "difference_white": top,
    }


def sweep() -> None:
    """Delete folders of demos that were killed: same owner, process gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        number = folder.name.removeprefix(PREFIX).partition("-")[0]
        ours = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
        if ours and number.isdecimal() and not Path(f"/proc/{number}").exists() and _gone(number):
            shutil.rmtree(folder, ignore_errors=True)


def _gone(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

