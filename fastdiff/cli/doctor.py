"""`fastdiff doctor`: what this machine has, each part checked by running it."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

OK, FAILED, ABSENT = "ok", "FAILED", "-"


@dataclass(frozen=True)
class Check:
    """One line. needed: without it nothing can be made."""

    name: str
    state: str
    detail: str = ""
    needed: bool = False


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    traceback: Annotated[bool, typer.Option(
        "--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Check this machine: versions, devices, kernels, models, video writing."""
    checks = [*_versions(), _cpu()]
    if any(check.state == FAILED for check in checks):
        advice = ["install what is missing: pip install diffusers-fastdiff"]
    else:
        checks += [*_gpus(), *_kernels(), *_models(), _ffmpeg()]
        advice = _advice(checks)
    works = not any(check.needed and check.state == FAILED for check in checks)
    if as_json:
        found = {"works": works, "checks": [asdict(check) for check in checks], "advice": advice}
        print(json.dumps(found, indent=2))
    else:
        _print(checks, advice)
    raise typer.Exit(0 if works else 1)


def _versions() -> list[Check]:
    from importlib import import_module

    from fastdiff.cli.sidecar import versions

    found = []
    for name, version in versions().items():
        if version is None:
            needed = name != "triton"
            why = "not installed" if needed else "not installed; GPU kernels need it"
            found.append(Check(name, FAILED if needed else ABSENT, why, needed))
            continue
        state, detail = OK, version
        if name in ("torch", "diffusers", "transformers"):
            try:
                import_module(name)
            except Exception as error:  # a broken install raises anything
                state, detail = FAILED, f"{version} does not import: {_short(error)}"
        found.append(Check(name, state, detail, needed=name != "triton"))
    return found


def _cpu() -> Check:
    import torch

    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return Check("CPU", OK, f"{torch.get_num_threads()} threads")
    return Check("CPU", OK, f"{torch.get_num_threads()} threads, {memory:.0f} GiB of memory")


def _gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU" if built else "this torch is built for the CPU only"
        return [Check("GPU", ABSENT, why)]
    found = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        try:
            x = torch.ones(64, 64, device=f"cuda:{i}")
            works = bool(((x @ x) == 64).all())
            problem = "" if works else "; a matrix product came out wrong"
        except RuntimeError as error:
            works, problem = False, f"; {_short(error)}"
        detail = (f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability "
                  f"{device.major}.{device.minor}{problem}")
        found.append(Check(f"GPU {i}", OK if works else FAILED, detail))
    return found


def _kernels() -> list[Check]:
    """Each implementation of block-sparse attention on each kind of device, run on a tiny case."""
    import torch

    from fastdiff.kernels.block_sparse_attention import implementations, probe

    found = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        # what models run in there
        dtype = torch.float16 if device == "cuda" else torch.float32
        for name, reasons in implementations(device, dtype, 64).items():
            label = f"attention '{name}' on {device}"
            needed = device == "cpu" and name == "torch"
            if reasons:
                found.append(Check(label, FAILED if needed else ABSENT, "; ".join(reasons), needed))
                continue
            problem = probe(name, device)
            found.append(Check(label, OK if problem is None else FAILED,
                               "ran, right result" if problem is None else _one(problem), needed))
    return found


def _models() -> list[Check]:
    from fastdiff.cli.show import hush
    from fastdiff.models import FIRST, load, shipped

    hush()
    found = []
    for name, model in shipped().items():
        try:
            load(model)
            check = Check(f"model {name}", OK, f"loads, {model.bytes / 1e6:.0f} MB")
        except Exception as error:  # whatever a broken file raises
            check = Check(f"model {name}", FAILED, _short(error), needed=name == FIRST)
        found.append(check)
    if FIRST not in shipped():
        why = "no weights in this installation: pass --model to generate"
        found.append(Check(f"model {FIRST}", FAILED, why, needed=True))
    return found


def _ffmpeg() -> Check:
    try:
        import imageio.v3
        import numpy as np

        from fastdiff.cli.output import write

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "check.mp4"
            write(path, np.zeros((5, 32, 48, 3), dtype="float32"), 8, {})
            shape = imageio.v3.imread(path).shape
        right = shape == (5, 32, 48, 3)
        return Check("ffmpeg", OK if right else FAILED,
                     "wrote and read a clip" if right else f"read back {shape}", needed=True)
    except Exception as error:  # missing package, missing binary, no space
        return Check("ffmpeg", FAILED, _short(error), needed=True)


def _advice(checks: list[Check]) -> list[str]:
    by_name = {check.name: check for check in checks}
    advice = [f"{check.name}: {check.detail}" for check in checks if check.state == FAILED]
    gpu = any(check.name.startswith("GPU ") and check.state == OK for check in checks)
    if not gpu:
        advice.append("no GPU: generation runs on the CPU; small sizes and few frames are quick")
    elif by_name["triton"].state != OK:
        advice.append("pip install triton, so that the GPU kernels can run")
    if not any(check.needed and check.state == FAILED for check in checks):
        advice.append('ready: fastdiff generate "a red apple on a blue background"')
    return advice


def _print(checks: list[Check], advice: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    style = {OK: "green", FAILED: "bold red", ABSENT: "dim"}
    table = Table(box=None, show_header=False)
    for check in checks:
        table.add_row(Text(check.state, style[check.state]), Text(check.name), Text(check.detail))
    console.print(table)
    for line in advice:
        console.print(line, markup=False, soft_wrap=True)


def _one(text: object) -> str:
    from fastdiff.cli.errors import one_line

    return one_line(str(text))[:200]


def _short(error: Exception) -> str:
    return _one(f"{type(error).__name__}: {error}")
