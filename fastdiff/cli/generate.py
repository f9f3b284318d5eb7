"""`fastdiff generate`: pictures and clips from prompts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli import values

_MODEL, _METHOD, _OUT = "Model and picture", "Method", "Output"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(
        metavar="PROMPT", help="What to show; several prompts give several files.",
        show_default=False)] = None,
    model: Annotated[str | None, _option(
        "--model", "-m", panel=_MODEL,
        help="A shipped name, a pipeline folder, or a hub id. Default: tiny-video.")] = None,
    video: Annotated[bool | None, _option(
        "--video/--image", panel=_MODEL,
        help="A clip or a picture. Default: what -o names, else what the model makes.")] = None,
    seed: Annotated[int | None, _option(
        "--seed", "-s", panel=_MODEL, help="Same seed, same result. Default: 0.")] = None,
    steps: Annotated[int | None, _option(
        "--steps", min=1, panel=_MODEL, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, _option(
        "--guidance", panel=_MODEL, help="How strictly to follow the prompt.")] = None,
    size: Annotated[str | None, _option(
        "--size", metavar="HxW", panel=_MODEL,
        help="HEIGHTxWIDTH in pixels, such as 256x384 for a wide picture; one number is a square."
    )] = None,
    upscale_to: Annotated[str | None, _option(
        "--upscale-to", metavar="HxW", panel=_MODEL,
        help="Make the result again at this larger size (method freeswim); --size is then the "
             "size to begin with.")] = None,
    frames: Annotated[int | None, _option(
        "--frames", min=1, panel=_MODEL, help="Frames of a clip.")] = None,
    fps: Annotated[int | None, _option(
        "--fps", min=1, panel=_MODEL, help="Frames a second of the file.")] = None,
    negative: Annotated[str | None, _option(
        "--negative", panel=_MODEL, help="What to keep out.")] = None,
    device: Annotated[str | None, _option(
        "--device", panel=_MODEL, help="cpu, cuda, cuda:1 ... Default: the GPU if there is one."
    )] = None,
    dtype: Annotated[str | None, _option(
        "--dtype", panel=_MODEL,
        help="float32, float16 or bfloat16. Default: float32 on a CPU, else bfloat16.")] = None,
    offload: Annotated[bool | None, _option(
        "--offload/--no-offload", panel=_MODEL,
        help="Keep only the part that is running on the GPU.")] = None,
    method: Annotated[str | None, _option(
        "--method", panel=_METHOD,
        help="A preset or a method (see `fastdiff methods`), or several as a+b; stock is none. "
             "Default: balanced."
    )] = None,
    density: Annotated[str | None, _option(
        "--density", panel=_METHOD, metavar="0..1", help="Share of query-key pairs to compute."
    )] = None,
    dense_steps: Annotated[str | None, _option(
        "--dense-steps", panel=_METHOD, metavar="N|0..1",
        help="First steps that stay dense: a count (3) or a fraction (0.2).")] = None,
    dense_layers: Annotated[str | None, _option(
        "--dense-layers", panel=_METHOD, metavar="N", help="First layers that stay dense.")] = None,
    tile: Annotated[str | None, _option(
        "--tile", panel=_METHOD, metavar="T,H,W",
        help="Tokens of a tile, such as 4,4,8: frames, height, width.")] = None,
    reuse: Annotated[str | None, _option(
        "--reuse", panel=_METHOD, metavar="N", help="Steps that share one selection.")] = None,
    min_tokens: Annotated[str | None, _option(
        "--min-tokens", panel=_METHOD, metavar="N", help="Shorter sequences stay dense.")] = None,
    tail: Annotated[bool | None, _option(
        "--tail/--no-tail", panel=_METHOD,
        help="Let skipped blocks count through their means.")] = None,
    option: Annotated[list[str] | None, _option(
        "--option", metavar="NAME=VALUE", panel=_METHOD,
        help="Any other knob of the method; may be repeated.")] = None,
    plan: Annotated[Path | None, _option(
        "--plan", panel=_METHOD, help="A plan file in place of --method.")] = None,
    strict: Annotated[bool | None, _option(
        "--strict", panel=_METHOD, help="Fail where attention would silently run dense.")] = None,
    compare: Annotated[bool, _option(
        "--compare", panel=_OUT,
        help="Also run stock with the same seed; write both, and both side by side.")] = False,
    out: Annotated[Path | None, _option(
        "--output", "-o", panel=_OUT,
        help="A .png or .mp4 file, or a folder. Default: a name from prompt and seed.")] = None,
    overwrite: Annotated[bool, _option(
        "--overwrite", panel=_OUT,
        help="Replace an existing file; otherwise the next free name is taken.")] = False,
    sidecar: Annotated[Path | None, _option(
        "--from", panel=_OUT,
        help="Make the result of this .json again; what is given here beside it is changed."
    )] = None,
    report: Annotated[bool, _option(
        "--report", panel=_OUT, help="Print what ran in every layer.")] = False,
    quiet: Annotated[bool, _option(
        "--quiet", "-q", panel=_OUT, help="Print only the names of the files.")] = False,
    as_json: Annotated[bool, _option(
        "--json", panel=_OUT, help="Print the result as JSON.")] = False,
    traceback: Annotated[bool, _option(
        "--traceback", panel=_OUT, help="Show where an error came from.")] = False,
) -> None:
    """Make a picture or a clip from each PROMPT.

    Example: fastdiff generate "a red apple on a blue background" --video -o apple.mp4
    """
    knobs = {"density": density, "dense_steps": dense_steps, "dense_layers": dense_layers,
             "tile": tile, "reuse": reuse, "min_tokens": min_tokens,
             "tail": None if tail is None else str(tail)}
    options = {name: value for name, value in knobs.items() if value is not None}
    options.update(values.pair(text) for text in option or [])
    given = {"negative": negative, "seed": seed, "steps": steps, "guidance": guidance,
             "frames": frames, "fps": fps, "strict": strict, "offload": offload}
    if size is not None:
        given["height"], given["width"] = values.size(size)
    if dtype is not None:
        given["dtype"] = values.dtype(dtype)

    if upscale_to is not None:
        from fastdiff.cli.choice import upscaled

        method = upscaled(method, plan, options, upscale_to)

    from fastdiff.cli.job import Job
    from fastdiff.cli.show import Show

    job = Job(
        prompts=prompts or [], model=model, method=method, plan_file=plan, options=options,
        kind=None if video is None else "video" if video else "image", device=device,
        given={name: value for name, value in given.items() if value is not None},
        sidecar=sidecar, compare=compare, out=out, overwrite=overwrite,
        command_line=(context.obj or {}).get("command_line", []),
    )
    job.run(Show(quiet=quiet, as_json=as_json, report=report))
