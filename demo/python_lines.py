"""The Python lines that make a result again, without the demo."""

from typing import Any

from fastdiff.cli import sampling
from fastdiff.cli.sidecar import Settings


def lines(settings: Settings, pipe: Any) -> str:
    """A program whose `frames` are the result: float [F, H, W, 3] or [1, H, W, 3] in 0..1."""
    accepted = sampling.parameters(pipe)
    shown = {name: value for name, value in sampling.arguments_of(settings).items()
             if name in accepted}
    plan = "" if settings.plan is None else f"pipe.enable_fastdiff({_methods(settings.plan)})\n"
    names = "" if settings.plan is None else "".join(
        f"{line}\n" for line in sorted({_import(entry) for entry in settings.plan["methods"]}))
    options = "".join(f"    {name}={value!r},\n" for name, value in shown.items())
    result = "frames[0]" if "num_frames" in accepted else "images"
    return (
        f"import torch\nfrom fastdiff import models\n{names}\n"
        f"pipe = models.load({settings.model!r}, {settings.device!r}, {settings.dtype!r})\n"
        f"{plan}"
        f"frames = pipe(\n    {settings.prompt!r},\n{options}"
        f"    generator=torch.Generator(\"cpu\").manual_seed({settings.seed}),\n"
        f"    output_type=\"np\",\n).{result}\n"
    )


def _class(entry: dict[str, Any]) -> type:
    from fastdiff.config import methods

    return methods()[entry["method"]]


def _import(entry: dict[str, Any]) -> str:
    cls = _class(entry)
    return f"from {cls.__module__} import {cls.__name__}"


def _methods(plan: dict[str, Any]) -> str:
    """Each method with the options that differ from its defaults."""
    shown = []
    for entry in plan["methods"]:
        cls = _class(entry)
        best = cls().to_dict()
        options = ", ".join(f"{name}={value!r}" for name, value in entry.items()
                            if name != "method" and value != best.get(name))
        shown.append(f"{cls.__name__}({options})")
    return ", ".join(shown)
