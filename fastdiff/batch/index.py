"""The index: one line a job, and the contact sheet; both made anew from sidecars and notes."""

import json
import time
from typing import Any

from fastdiff.batch.claims import Claim, Claims
from fastdiff.batch.folder import Folder
from fastdiff.batch.sheet import page
from fastdiff.cli import choice, output

INDEX, SHEET = "index.jsonl", "index.html"
_LOCK = "index"


def entry(record: dict[str, Any]) -> dict[str, Any]:
    """A line of the index: what was asked for, and what became of it."""
    failed = "error" in record
    settings = record["settings"] if failed else record
    plan, report = settings["plan"], None if failed else record["report"]
    told = {
        "id": record["id"] if failed else record["batch"]["id"],
        "status": "failed" if failed else "done",
        "file": None if failed else record["file"],
        "error": record["error"] if failed else None,
        "where": record["where"] if failed else record["batch"]["where"],
    }
    told |= {name: settings[name] for name in (
        "prompt", "negative", "model", "kind", "seed", "steps", "guidance", "height", "width",
        "frames", "fps", "dtype", "method")}
    told |= {
        "methods": choice.title(plan),
        "density_asked": next((part["density"] for part in (plan or {"methods": []})["methods"]
                               if part.get("density") is not None), None),
        "density": report["density_all_calls"] if report else None,
        "seconds": None if failed else record["seconds"],
        "together": None if failed else record["batch"]["size"],
        "when": record["when"] if failed else record["batch"]["when"],
    }
    return told


def write(folder: Folder, claims: Claims, wait: bool = True) -> bool:
    """Make index and sheet anew; one worker at a time, so that an older view replaces no newer.

    wait: for another worker that is at it. Returns whether this one wrote.
    """
    held: Claim | None = claims.take(_LOCK)
    while held is None and wait:
        time.sleep(0.05)
        held = claims.take(_LOCK)
    if held is None:
        return False
    try:
        for path in folder.path.glob(".index.*.part.*"):
            # of one that was killed here
            path.unlink(missing_ok=True)
        entries = [entry(record) for record in folder.records()]
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in entries)
        for name, text in ((INDEX, lines), (SHEET, page(entries, folder.path.resolve().name))):
            with output.atomic(folder.path / name) as part:
                part.write_text(text, encoding="utf-8")
    finally:
        claims.release(held)
    return True
