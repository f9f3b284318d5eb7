"""What the page says while a job waits, runs and ends, as HTML."""

import asyncio
import base64
import html
from collections.abc import AsyncIterator
from typing import Any

from fastdiff.demo.worker import FAILED, STOPPED, WAITING, Ticket, Worker

EVERY = 0.2  # seconds


async def follow(worker: Worker, ticket: Ticket) -> AsyncIterator[str]:
    """The state of a job as it changes, until it is over. A closed page ends the job."""
    shown = ""
    try:
        while not ticket.over.is_set():
            now = progress(ticket, worker.position(ticket))
            if now != shown:
                shown = now
                yield now
            await asyncio.sleep(EVERY)
    finally:
        if not ticket.over.is_set():
            worker.drop(ticket)


def progress(ticket: Ticket, before: int) -> str:
    """A job that waits or runs."""
    if ticket.state == WAITING:
        jobs = "1 job is" if before == 1 else f"{before} jobs are"
        text = "Starting" if before == 0 else f"Waiting: {jobs} before yours"
        return _box(text, None, None)
    done = ticket.step / ticket.steps if ticket.steps else None
    if ticket.stopping:
        return _box("Stopping", done, ticket.preview)
    where = ""
    if ticket.steps:
        full = ticket.step >= ticket.steps
        where = " · decoding" if full else f" · step {ticket.step} of {ticket.steps}"
    return _box(f"{ticket.phase}{where} · {int(ticket.elapsed)} s", done, ticket.preview)


def ending(ticket: Ticket) -> str:
    """A job that is over."""
    if ticket.state == STOPPED:
        return note("Stopped. Nothing was written.")
    if ticket.state == FAILED:
        return problem(ticket.problem)
    return note(f"Done in {ticket.elapsed:.0f} s.")


def note(text: str) -> str:
    return ("<div class='fd-live' role='status'><div class='fd-line'>"
            f"{html.escape(text)}</div></div>")


def problem(text: str) -> str:
    """One sentence about what went wrong."""
    text = text[:1].upper() + text[1:]
    return f"<div class='fd-live fd-problem' role='alert'>{html.escape(text)}</div>"


def _box(text: str, done: float | None, preview: bytes | None) -> str:
    bar = "<div class='fd-bar'><div style='width:100%' class='fd-busy'></div></div>"
    if done is not None:
        bar = f"<div class='fd-bar'><div style='width:{min(done, 1):.1%}'></div></div>"
    picture = ""
    if preview is not None:
        data = base64.b64encode(preview).decode()
        picture = (f"<img class='fd-preview' alt='Preview of the latents' "
                   f"src='data:image/jpeg;base64,{data}'>")
    return (f"<div class='fd-live' role='status'><div class='fd-line'>{html.escape(text)}</div>"
            f"{bar}{picture}</div>")


def cards(facts: dict[str, Any] | None, seconds: float, report: dict[str, Any] | None) -> str:
    """The figures of a result."""
    found = [("time", f"{seconds:.2f} s", "the whole call of the pipeline")]
    if facts is not None:
        near = facts["psnr"]
        found = [
            ("stock", f"{facts['stock_seconds']:.2f} s", "same seed, without FastDiff"),
            ("fast", f"{seconds:.2f} s", "with the methods of the panel"),
            ("speed-up", f"{facts['speedup']:.2f}×", "one pair of runs: an impression"),
            ("PSNR", "equal" if near is None else f"{near:.1f} dB", "fast against stock"),
            ("SSIM", f"{facts['ssim']:.4f}", "fast against stock"),
        ]
    if report is not None and report["layers"]:
        found.append(("density", f"{report['density_all_calls']:.2f}",
                      "attention computed, of stock's, over all calls"))
    return figures(found) + _why(report)


def figures(found: list[tuple[str, str, str]]) -> str:
    """Cards of (name, value, what it is)."""
    body = "".join(f"<div class='fd-card'><span>{html.escape(name)}</span><b>{html.escape(value)}"
                   f"</b><i>{html.escape(about)}</i></div>" for name, value, about in found)
    return f"<div class='fd-cards'>{body}</div>"


def _why(report: dict[str, Any] | None) -> str:
    """Why attention was dense, where it was."""
    if report is None:
        return ""
    lines = [f"{count} calls dense by setting: {why}"
             for why, count in report["dense_calls"].items()]
    lines += [f"{count} calls fell back to dense: {why}"
              for why, count in report["fallbacks"].items()]
    if report["layers"] and not report["sparse_calls"]:
        lines.append("Every call ran dense, so this is stock attention. Shorter sequences than the "
                     "break-even of the device gain nothing; min_tokens = 1 and max_density = 1 "
                     "show the method at work all the same.")
    return "".join(f"<p class='fd-note'>{html.escape(line)}</p>" for line in lines)
