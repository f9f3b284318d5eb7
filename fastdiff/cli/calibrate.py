"""`fastdiff calibrate`: a plan for one model, size, number of steps and scheduler."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli import values
from fastdiff.cli.errors import InputError

_WHAT, _GOAL, _SEARCH, _OUT = "Model and size", "Goal: exactly one", "Search", "Output"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def calibrate(
    method: Annotated[str, _option(
        "--method", panel=_SEARCH,
        help="sparse-vdit: a mode for every head; tile-sparse or another attention method: a "
             "density for every layer or head. Default: tile-sparse.")] = "tile-sparse",
    model: Annotated[str | None, _option(
        "--model", "-m", panel=_WHAT, help="A shipped name, a pipeline folder, or a hub id. "
        "Default: tiny-video.")] = None,
    prompts: Annotated[str, _option(
        "--prompts", metavar="FILE|default", panel=_SEARCH,
        help="A text file with one prompt a line. Default: four built-in ones.")] = "default",
    density: Annotated[float | None, _option(
        "--density", panel=_GOAL, metavar="0..1",
        help="Mean share of query-key pairs in the calls that are sparse.")] = None,
    target_psnr: Annotated[float | None, _option(
        "--target-psnr", panel=_GOAL, metavar="DB",
        help="The smallest density with this mean PSNR to stock.")] = None,
    max_error: Annotated[float | None, _option(
        "--max-error", panel=_GOAL, metavar="E",
        help="The smallest density with at most this relative error of the last latents.")] = None,
    out: Annotated[Path, _option(
        "--output", "-o", panel=_OUT, help="The plan to write. Default: plan.json.")] = Path(
            "plan.json"),
    overwrite: Annotated[bool, _option(
        "--overwrite", panel=_OUT, help="Replace an existing plan.")] = False,
    restart: Annotated[bool, _option(
        "--restart", panel=_OUT, help="Begin anew where an unfinished search is found.")] = False,
    video: Annotated[bool | None, _option(
        "--video/--image", panel=_WHAT, help="Clips or pictures.")] = None,
    size: Annotated[str | None, _option(
        "--size", metavar="HxW", panel=_WHAT, help="As in `fastdiff generate`.")] = None,
    frames: Annotated[int | None, _option(
        "--frames", min=1, panel=_WHAT, help="Frames of a clip.")] = None,
    steps: Annotated[int | None, _option(
        "--steps", min=1, panel=_WHAT, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, _option(
        "--guidance", panel=_WHAT, help="How strictly to follow the prompt.")] = None,
    seed: Annotated[int, _option("--seed", "-s", panel=_SEARCH, help="Of the first prompt; the "
                                 "others count on from it. Default: 1000.")] = 1000,
    device: Annotated[str | None, _option("--device", panel=_WHAT, help="cpu, cuda ...")] = None,
    dtype: Annotated[str | None, _option(
        "--dtype", panel=_WHAT, help="float32, float16 or bfloat16.")] = None,
    ranges: Annotated[int | None, _option(
        "--ranges", min=1, panel=_SEARCH, metavar="N",
        help="Ranges of steps. Default: one a step for sparse-vdit, else 4.")] = None,
    loss: Annotated[str, _option(
        "--loss", panel=_SEARCH, metavar="relative|raw",
        help="sparse-vdit: relative error of a head (default), or the paper's raw one.")]
    = "relative",
    penalty: Annotated[float, _option(
        "--penalty", panel=_SEARCH, help="sparse-vdit: the paper's lambda. Default: 0.5.")] = 0.5,
    eps: Annotated[float | None, _option(
        "--eps", panel=_SEARCH, help="sparse-vdit: a head with a higher loss stays full. Default: "
        "found by bisection for the density.")] = None,
    max_skip: Annotated[float, _option(
        "--max-skip", panel=_SEARCH,
        help="sparse-vdit: largest share of skipped heads. Default: 0.03.")] = 0.03,
    rounds: Annotated[int, _option(
        "--rounds", min=1, panel=_SEARCH, help="sparse-vdit: passes. Default: 2.")] = 2,
    option: Annotated[list[str] | None, _option(
        "--option", metavar="NAME=VALUE", panel=_SEARCH,
        help="A knob of the method, such as dense_steps=0.1; may be repeated.")] = None,
    quiet: Annotated[bool, _option("--quiet", "-q", panel=_OUT, help="Print nothing.")] = False,
    as_json: Annotated[bool, _option("--json", panel=_OUT, help="Print the plan.")] = False,
    traceback: Annotated[bool, _option(
        "--traceback", panel=_OUT, help="Show where an error came from.")] = False,
) -> None:
    """Find a plan by real runs, and write it as JSON.

    A search that was stopped goes on where it was when it is started again.

    Example: fastdiff calibrate --target-psnr 30 -o plan.json, and then: fastdiff generate "a red
    apple" --plan plan.json
    """
    from fastdiff import calibration, models
    from fastdiff.cli import sampling, sidecar
    from fastdiff.cli.job import Job, fit, load
    from fastdiff.cli.output import write_json
    from fastdiff.cli.show import Show
    from fastdiff.config import from_plan, to_plan
    from fastdiff.policies import Policy

    goal = calibration.Goal(density, target_psnr, max_error)
    rules = calibration.Rules(loss, penalty, eps, max_skip, rounds)
    asked = calibration.prompts(prompts)
    _check_output(out, overwrite)
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "frames": frames}
    if size is not None:
        given["height"], given["width"] = values.size(size)
    if dtype is not None:
        given["dtype"] = values.dtype(dtype)
    job = Job(
        prompts=[], model=model, method=method, device=device,
        kind=None if video is None else "video" if video else "image",
        options=dict(values.pair(text) for text in option or []),
        given={name: value for name, value in given.items() if value is not None},
    )
    found = models.find(model or models.FIRST)
    settings = job.settings(found)
    methods = from_plan(settings.plan or {})
    if len(methods) != 1 or not isinstance(methods[0], Policy):
        raise InputError(f"--method {method!r} is not one attention method: only the "
                                "choice of what to attend to can be calibrated")
    show = Show(quiet=quiet, as_json=as_json)
    pipe = load(found, settings, show)
    settings = fit(pipe, settings, job.typed)
    call = sampling._arguments(pipe, settings, lambda step, of: None)
    for name in ("prompt", "generator", "output_type", "callback_on_step_end"):
        call.pop(name, None)
    made = {"model": found.name, "model_sha256": found.sha256 if found.shipped else None,
            "method": methods[0].to_dict(), "goal": vars(goal), "rules": vars(rules),
            "ranges": ranges, "prompts": asked, "seed": seed, "call": call,
            "dtype": settings.dtype, "device": settings.device}
    folder = out.with_name(f"{out.name}.work")
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    work = calibration.Work(folder, made)
    try:
        with _progress(show) as bar:
            runs = calibration.Runs(pipe, asked, call, work, seed, bar)
            policy = calibration.calibrate(runs, methods[0], goal, ranges, rules, show.note)
    except BaseException:
        work.leave()
        raise
    content = {**to_plan([policy]), "made": {**made, "versions": sidecar.versions()}}
    write_json(out, content)
    work.done()
    if as_json:
        print(json.dumps(content, indent=2))
        return
    assert policy.calibration is not None
    show.line(f"wrote {out}: {policy.calibration.title()}")
    for what, value in policy.calibration.found.items():
        show.line(f"  {what.replace('_', ' ')}: {_plain(value)}")
    show.line(f"use it: fastdiff generate PROMPT --plan {out}")


def _check_output(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"{str(out)!r} exists: --overwrite replaces it")
    if not out.parent.is_dir():
        raise InputError(f"the folder {str(out.parent)!r} does not exist")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _progress(show: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the steps of the generation that runs, on a terminal."""
    if show.quiet or not sys.stderr.isatty():
        yield lambda what, step, steps: None
        return
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(),
        progress.MofNCompleteColumn(), progress.TextColumn("generation {task.fields[run]}"),
        progress.TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    )
    with bar:
        task = bar.add_task("stock", total=None, run=0)
        begun = 0

        def advance(what: str, step: int, steps: int) -> None:
            nonlocal begun
            begun += step == 1
            bar.update(task, description=what, completed=step, total=steps, run=begun)

        yield advance
