"""`fastdiff models`: what ships with the package."""

import json
from typing import Annotated, Any

import typer

from fastdiff.models import Model, shipped

_LICENSE = "Apache-2.0"


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that ship with FastDiff."""
    rows = [row(model) for model in shipped().values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if rows:
        table = Table("model", "makes", "size", "default", "licence", "about", box=None)
        for found in rows:
            size = "x".join(str(found[side]) for side in ("height", "width"))
            frames = f", {found['frames']} frames" if found["frames"] else ""
            table.add_row(found["name"], ", ".join(found["kind"]), f"{found['bytes'] / 1e6:.1f} MB",
                          f"{size}{frames}, {found['steps']} steps", found["license"],
                          found["summary"])
        console.print(table)
    else:
        console.print("No weights are in this installation.")
    console.print("Any other model: --model with a pipeline folder or a hub id.", style="dim")


def row(model: Model) -> dict[str, Any]:
    """A model as plain data."""
    best = model.defaults
    return {
        "name": model.name, "kind": list(best.kind), "bytes": model.bytes,
        "height": best.height, "width": best.width, "frames": best.frames, "fps": best.fps,
        "steps": best.steps, "guidance": best.guidance, "multiple": best.multiple,
        "frames_rule": best.frames_rule, "license": best.license or _LICENSE,
        "summary": best.summary, "sha256": model.sha256,
    }
