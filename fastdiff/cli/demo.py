"""`fastdiff demo`: the demo in a browser, on this machine."""

from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from fastdiff.cli.errors import InputError

_MODEL, _SERVER, _BOUNDS = "Model", "Server", "Bounds"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def demo(
    model: Annotated[str, _option(
        "--model", "-m", panel=_MODEL,
        help="A shipped name, a pipeline folder, or a hub id. Default: tiny-video."
    )] = "tiny-video",
    device: Annotated[str | None, _option(
        "--device", panel=_MODEL, help="cpu, cuda, cuda:1 ... Default: the GPU if there is one."
    )] = None,
    dtype: Annotated[str | None, _option(
        "--dtype", panel=_MODEL,
        help="float32, float16 or bfloat16. Default: float32 on a CPU, else bfloat16.")] = None,
    offload: Annotated[bool, _option(
        "--offload", panel=_MODEL, help="Keep only the part that is running on the GPU.")] = False,
    host: Annotated[str, _option(
        "--host", panel=_SERVER,
        help="Address to listen on; 0.0.0.0 is every network. Default: 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int | None, _option(
        "--port", min=1, max=65535, panel=_SERVER, help="Default: the next free one from 7860."
    )] = None,
    password: Annotated[str | None, _option(
        "--password", envvar="FASTDIFF_DEMO_PASSWORD", panel=_SERVER,
        help="Ask for it (any name). The variable FASTDIFF_DEMO_PASSWORD is not seen by `ps`."
    )] = None,
    browser: Annotated[bool, _option(
        "--open", panel=_SERVER, help="Open the page in the browser.")] = False,
    queue: Annotated[int, _option(
        "--queue", min=1, panel=_BOUNDS, help="Jobs that may wait or run. Default: 64.")] = 64,
    per_user: Annotated[int, _option(
        "--per-user", min=1, panel=_BOUNDS, help="Of them, of one page. Default: 2.")] = 2,
    max_side: Annotated[int | None, _option(
        "--max-side", min=8, panel=_BOUNDS,
        help="Longest side in pixels. Default: twice the model's best.")] = None,
    max_frames: Annotated[int | None, _option(
        "--max-frames", min=1, panel=_BOUNDS,
        help="Frames of a clip. Default: about twice the model's best.")] = None,
    max_steps: Annotated[int, _option(
        "--max-steps", min=1, panel=_BOUNDS, help="Denoising steps. Default: 100.")] = 100,
    max_seconds: Annotated[float, _option(
        "--max-seconds", min=1, panel=_BOUNDS, help="Time that a job may run. Default: 1800."
    )] = 1800,
    traceback: Annotated[bool, _option(
        "--traceback", panel=_SERVER, help="Show where an error came from.")] = False,
) -> None:
    """Show stock beside fast in the browser: pictures, clips, batches, attention masks.

    Example: fastdiff demo --open
    """
    if find_spec("gradio") is None:
        raise InputError('the demo needs gradio: pip install "diffusers-fastdiff[demo]"')
    bounds = {"queue": queue, "per_user": per_user, "side": max_side, "frames": max_frames,
              "steps": max_steps, "seconds": max_seconds}
    # by name: the demo stands above the command line and imports it
    server = import_module("fastdiff.demo.server")
    server.run(
        model=model, device=device, dtype=dtype, offload=offload, browser=browser,
        place=server.Place(host, port, password),
        bounds={name: value for name, value in bounds.items() if value is not None},
    )
