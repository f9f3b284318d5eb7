"""What a run shows: a line a result, a bar on a terminal, or events as JSON for logs."""

import json
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastdiff.batch.index import SHEET
from fastdiff.batch.watch import Outcome


class Display:
    """quiet: only the files' names, and errors on stderr. as_json: one event a line on stdout."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet, self._json = quiet, as_json
        self._console = Console(soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        if not quiet and not as_json and sys.stdout.isatty():
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(),
                                 MofNCompleteColumn(), TextColumn("{task.fields[more]}"),
                                 console=self._console, transient=True)

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show one event of a run."""
        if self._json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
        elif self._quiet:
            if event["event"] == "done":
                print(event["file"], flush=True)
            elif event["event"] == "failed":
                print(f"failed: {event['where']}: {event['error']}", file=sys.stderr, flush=True)
        else:
            getattr(self, f"_{event['event']}")(event)

    def step(self, step: int, of: int) -> None:
        """Show how far the call is that runs in this process."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"step {step} of {of}")

    def outcome(self, outcome: Outcome, folder: str) -> None:
        """The last lines."""
        if self._quiet or self._json:
            return
        for gain in outcome.gains:
            self._line(f"{gain.size} at a time took {gain.together:.2f} s a job, one at a time "
                       f"{gain.alone:.2f} s: {gain.factor:.2f}x as fast")
        for where, error in outcome.failed:
            self._line(f"failed: {where}: {error}", "yellow")
        if outcome.failed:
            self._line("--retry-failed tries them again")
        self._line(f"all results: {folder}/{SHEET}")

    def _start(self, event: dict[str, Any]) -> None:
        self._line(f"{event['jobs']} jobs, {event['settled']} settled before, "
                   f"{event['to_do']} to make")
        if self._bar is not None:
            self._task = self._bar.add_task("loading", total=event["jobs"], more="",
                                            completed=event["settled"])

    def _done(self, event: dict[str, Any]) -> None:
        shared = f", {event['together']} at a time" if event["together"] > 1 else ""
        self._line(f"{_count(event)} {event['file']}  ({event['seconds']:.1f} s{shared}; "
                   f"{_pace(event)})")
        self._advance(event)

    def _failed(self, event: dict[str, Any]) -> None:
        self._line(f"{_count(event)} failed: {event['where']}: {event['error']}", "yellow")
        self._advance(event)

    def _end(self, event: dict[str, Any]) -> None:
        self._line(f"{event['made']} made, {event['skipped']} settled before, {event['failed']} "
                   f"failed, in {duration(event['seconds'])}")

    def _advance(self, event: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=event["finished"], more=_pace(event))

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _count(event: dict[str, Any]) -> str:
    return f"[{event['finished']}/{event['jobs']}]"


def _pace(event: dict[str, Any]) -> str:
    if event["per_minute"] is None:
        return ""
    return f"{event['per_minute']:.1f} a minute, {duration(event['seconds_left'])} left"
