"""`fastdiff bench`: measurements with the scripts of a source checkout; results go to a file."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Measure methods on this machine; needs a source "
                  "checkout, where the results go to benchmarks/results.")

Bar = Callable[[str, int, int], None]


def script(name: str) -> Any:
    """A module of benchmarks/, from the checkout that this package runs from."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / f"{name}.py").is_file():
        raise InputError(f"`fastdiff bench` runs the scripts of a source checkout, and "
                         f"{str(folder)!r} has no {name}.py: clone the repository and "
                         "`pip install -e .` there")
    for path in (str(folder), str(folder.parent)):
        if path not in sys.path:
            sys.path.insert(0, path)
    return importlib.import_module(name)


@contextmanager
def progress(quiet: bool) -> Iterator[Bar]:
    """A bar on a terminal; yields its callback (what, done, of)."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich import progress as bars
    from rich.console import Console

    bar = bars.Progress(
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total)


def words_of(**options: Any) -> list[str]:
    """Options as the words that a script's parser takes; None and False are left out."""
    found: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, (list, tuple)):
            found += [flag, *map(str, value)] if value else []
        elif value is True:
            found.append(flag)
        elif value not in (None, False):
            found += [flag, str(value)]
    return found


@app.command("methods")
def methods(
    model: Annotated[str, typer.Option(
        "--model", "-m", help="A shipped name, a pipeline folder, or a hub id.")] = "tiny-video",
    method: Annotated[list[str] | None, typer.Option(
        "--method", help="Only this method; may be repeated. Default: all.",
        show_default=False)] = None,
    density: Annotated[float, typer.Option(
        "--density", help="Share of query-key pairs, the same for all.")] = 0.25,
    dense_steps: Annotated[float, typer.Option(
        "--dense-steps", help="Share of steps that stay dense, the same for all.")] = 0.2,
    plan: Annotated[list[Path] | None, typer.Option(
        "--plan", help="A calibrated plan as one more row; may be repeated.",
        show_default=False)] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, max=32, help="Prompts.")] = 32,
    seed: Annotated[list[int] | None, typer.Option(
        "--seed", help="A seed; may be repeated. Default: 0 and 1.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(
        "--steps", min=1, help="Denoising steps.", show_default=False)] = None,
    size: Annotated[int | None, typer.Option(
        "--size", help="Side in pixels.", show_default=False)] = None,
    frames: Annotated[int | None, typer.Option(
        "--frames", help="Frames of a clip.", show_default=False)] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts at a time.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds.")] = 20,
    share: Annotated[float | None, typer.Option(
        "--share", metavar="0..1", show_default=False, help="Part of stock's time that the row of "
        "fewer steps gets. Default: what our method needs here.")] = None,
    device: Annotated[str | None, typer.Option(
        "--device", help="cpu or cuda.", show_default=False)] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A smoke run, a minute on a CPU.")] = False,
    restart: Annotated[bool, typer.Option(
        "--restart", help="Forget an unfinished run.")] = False,
    out: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Result file. Default: in benchmarks/results.",
        show_default=False)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar and no table.")] = False,
    traceback: Annotated[bool, typer.Option(
        "--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Every attention method on a model: likeness to stock, realised density, time, memory.

    A run that was stopped goes on where it was.
    """
    from rich.console import Console

    from fastdiff.cli.show import hush

    found = script("methods")
    words = words_of(
        model=model, methods=method, density=density, dense_steps=dense_steps, plan=plan,
        prompts=prompts, seeds=seed, steps=steps, size=size, frames=frames, batch=batch,
        repeats=repeats, share=share, device=device, tiny=tiny, restart=restart, output=out)
    hush()
    console = Console(width=max(180, Console().width), highlight=False)
    with progress(quiet) as bar:
        found.main(words, bar, (lambda what: None) if quiet else console.print)


@app.command("kernels")
def bench_kernels(
    impl: Annotated[list[str] | None, typer.Option(
        "--impl", help="gluon, triton, torch; may be repeated. Default: all that run here.",
        show_default=False)] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds.")] = 8,
    only: Annotated[str | None, typer.Option(
        "--only", help="Part of a shape's name.", show_default=False)] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes, on any device.")] = False,
    out: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Result file or folder. Default: benchmarks/results.",
        show_default=False)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar and no rows.")] = False,
    traceback: Annotated[bool, typer.Option(
        "--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Block-sparse attention against the best dense kernel of this machine, interleaved."""
    import torch
    from rich.console import Console

    if not tiny and not torch.cuda.is_available():
        raise InputError("no CUDA device here: --tiny runs small shapes on the CPU")
    found = script("kernels")
    words = words_of(impl=impl, rounds=rounds, only=only, tiny=tiny, output=out)
    console = Console(width=max(120, Console().width), highlight=False)
    with progress(quiet) as bar:
        found.main(words, bar, (lambda what: None) if quiet else console.print)
