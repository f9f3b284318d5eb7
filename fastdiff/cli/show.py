"""What a run tells: results on stdout, progress and notes on stderr."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fastdiff.cli import choice


@dataclass(frozen=True)
class Show:
    """How much to print. quiet: only file names. as_json: one JSON object in place of text."""

    quiet: bool = False
    as_json: bool = False
    report: bool = False

    def note(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet and not self.as_json:
            _stderr().print(text, style="dim", markup=False, highlight=False)

    def line(self, text: str, style: str = "") -> None:
        """A line of the result on stdout."""
        if not self.quiet and not self.as_json:
            Console(soft_wrap=True).print(text, style=style, markup=False, highlight=False)

    @contextmanager
    def steps(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar over denoising steps, on a terminal; yields its (step, of) callback."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda step, total: None
            return
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn("{task.description}"), progress.BarColumn(),
            progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(), console=_stderr(), transient=True,
        )
        with bar:
            task = bar.add_task(f"{label}: text", total=None)

            def advance(step: int, total: int) -> None:
                doing = "decoding" if step >= total else "steps"
                bar.update(task, completed=step, total=total, description=f"{label}: {doing}")

            yield advance

    def results(self, records: list[dict[str, Any]]) -> None:
        """All results, once everything is written."""
        if self.as_json:
            print(json.dumps({"results": records}, indent=2, ensure_ascii=False))
        elif self.quiet:
            for record in records:
                print(record["path"])

    def result(self, record: dict[str, Any], table: str | None) -> None:
        """One result: the file, seconds, density, every dense fallback."""
        clip = f"{record['frames']} frames of " if record["kind"] == "video" else ""
        height, width = choice.made_size(record)
        self.line(f"wrote {record['path']}  ({clip}{height}x{width}, "
                  f"{record['steps']} steps, {record['seconds']:.1f} s on {record['device']})")
        self._comparison(record.get("compare"))
        self._attention(record)
        if self.report and table is not None:
            self.line(table)

    def _comparison(self, found: dict[str, Any] | None) -> None:
        if found is None:
            return
        near = "equal" if found["psnr"] is None else f"PSNR {found['psnr']:.1f} dB"
        self.line(f"stock took {found['stock_seconds']:.1f} s: {found['speedup']:.2f}x as fast; "
                  f"{near} to stock")
        self.line(f"wrote {found['stock']} and {found['side_by_side']}")

    def _attention(self, record: dict[str, Any]) -> None:
        report = record["report"]
        name = choice.title(record["plan"]) if report else ""
        if report is None:
            self.line("method: stock")
            return
        sparse, computed = report["sparse_calls"], report["density_all_calls"]
        for method, facts in report["methods"].items():
            self.line(f"  {method}: {', '.join(f'{what} {n}' for what, n in facts.items())}")
        if sparse:
            self.line(f"method: {name}, density {report['density']:.2f} in {sparse} "
                      f"sparse calls; {computed:.0%} of stock's attention operations in all")
        elif report["layers"]:
            self.line(f"method: {name}, but every call ran dense", "yellow")
        else:
            self.line(f"method: {name}")
        for why, count in report["dense_calls"].items():
            self.line(f"  dense by setting, {count} calls: {why}")
        for why, count in report["fallbacks"].items():
            self.line(f"  dense fallback, {count} calls: {why}", "yellow")


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True)


def hush() -> None:
    """Libraries' own chatter would bury our lines; dense fallbacks are told from the report."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("fastdiff").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
