"""`fastdiff batch`: many pictures and clips from one file."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

_JOBS, _WORK, _SHOWN = "Jobs", "Work", "Shown"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def batch(
    context: typer.Context,
    source: Annotated[Path | None, typer.Argument(
        metavar="JOBS", show_default=False,
        help="A .jsonl or .csv file with the fields of generate, or a text file of prompts.")
    ] = None,
    out: Annotated[Path | None, _option(
        "--output", "-o", panel=_JOBS, help="The folder for results, index and contact sheet."
    )] = None,
    set_for_all: Annotated[list[str] | None, _option(
        "--set", metavar="NAME=VALUE", panel=_JOBS,
        help="A field for jobs that leave it open; may be repeated.")] = None,
    model: Annotated[str | None, _option(
        "--model", "-m", panel=_JOBS, help="Short for --set model=...")] = None,
    grid: Annotated[list[str] | None, _option(
        "--grid", metavar="NAME=A,B,C", panel=_JOBS,
        help="Every job with each of these values; several grids multiply.")] = None,
    images: Annotated[str | None, _option(
        "--images", metavar="'*.png'", panel=_JOBS,
        help="Every job with each picture to start from.")] = None,
    device: Annotated[str | None, _option(
        "--device", panel=_WORK, help="cpu, cuda, cuda:1 ... Default: the GPU if there is one."
    )] = None,
    batch_size: Annotated[str, _option(
        "--batch-size", metavar="N|auto", panel=_WORK,
        help="Jobs in one call of the pipeline. Default: auto, as many as measurably pay.")
    ] = "auto",
    gpus: Annotated[str | None, _option(
        "--gpus", metavar="N|all", panel=_WORK, help="A worker on each of so many GPUs.")] = None,
    processes: Annotated[int | None, _option(
        "--processes", min=1, panel=_WORK, help="So many workers, whatever they run on.")] = None,
    retry_failed: Annotated[bool, _option(
        "--retry-failed", panel=_WORK, help="Try again what failed before.")] = False,
    dry_run: Annotated[bool, _option(
        "--dry-run", panel=_WORK, help="Check everything, list the jobs, make nothing.")] = False,
    quiet: Annotated[bool, _option(
        "--quiet", "-q", panel=_SHOWN, help="Print only the names of the files.")] = False,
    as_json: Annotated[bool, _option(
        "--json", panel=_SHOWN, help="Print one JSON object a result, for logs.")] = False,
    traceback: Annotated[bool, _option(
        "--traceback", panel=_SHOWN, help="Show where an error came from.")] = False,
    worker: Annotated[Path | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Make every job of a file that has no result yet. Stop it and start it again at will.

    Example: fastdiff batch jobs.jsonl -o out/ --grid seed=1,2,3 --gpus all
    """
    words = [*(set_for_all or []), *([] if model is None else [f"model={model}"])]
    # above us: it uses the steps of generate
    command = import_module("fastdiff.batch.command")
    command.batch(
        source, out, set_for_all=words, grid_words=grid or [], images=images, device=device,
        batch_size=batch_size, gpus=gpus, processes=processes, retry_failed=retry_failed,
        dry_run=dry_run, quiet=quiet, as_json=as_json, worker=worker,
        command_line=(context.obj or {}).get("command_line", []),
    )
