"""From method, plan and options on the command line to a plan: the method with all its options."""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.cli import values
from fastdiff.cli.errors import InputError, nearest

STOCK = "stock"
UPSCALE = "freeswim"


def plan(
    given: str | None, file: Path | None, options: dict[str, str], before: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The plan to run with; None is stock.

    given: method names with "+" between them. file: a plan file. options: knobs as typed. before:
    the plan of a sidecar, which `given` and `file` replace and `options` change.
    """
    from fastdiff.config import PRESETS, from_plan, make_methods, methods, to_plan

    if given == STOCK:
        if options or file is not None:
            typed = "--plan" if file is not None else f"--{next(iter(options)).replace('_', '-')}"
            raise InputError(f"{typed} needs a method other than {STOCK}")
        return None
    if given is not None and file is not None:
        raise InputError("give either --method or --plan, not both")
    names = [] if given is None else [name.strip() for name in given.split("+")]
    known = [*PRESETS, *methods()]
    for name in names:
        if name not in known:
            raise InputError(f"unknown method {name!r}: {nearest(name, [STOCK, *known])}")
    source = file if file is not None else before if given is None else None
    try:
        start = make_methods(names, {}) if source is None else from_plan(source)
        return to_plan(make_methods(start, _typed(start, options)))
    except TypeError as error:
        raise InputError(f"the plan has a value of the wrong type: {error}") from error


def upscaled(given: str | None, file: Path | None, options: dict[str, str], size: str) -> str:
    """The method names with upscaling to `size` (HxW) among them; its target goes into `options`.
    """
    if file is not None:
        raise InputError("--upscale-to and --plan do not go together: give --method, or write "
                         f"{UPSCALE} into the plan")
    height, width = values.size(size, "--upscale-to")
    options[f"{UPSCALE}.target"] = f"{height}x{width}"
    names = [] if given in (None, STOCK) else given.split("+")
    return "+".join(names if UPSCALE in names else [*names, UPSCALE])


def upscales(settings: dict[str, Any] | None) -> bool:
    """Whether a plan makes results larger than the size of the call."""
    return settings is not None and any(
        entry["method"] == UPSCALE for entry in settings["methods"])


def made_size(record: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a result, by its settings and plan."""
    plan = record.get("plan") or {"methods": []}
    larger = [entry["target"] for entry in plan["methods"] if entry["method"] == UPSCALE]
    height, width = larger[0] if larger else (record["height"], record["width"])
    return height, width


def _typed(start: Sequence[Any], options: dict[str, str]) -> dict[str, Any]:
    """Words as values of the knob they name; what nobody has is left to be refused by name."""
    found: dict[str, Any] = {}
    for option, text in options.items():
        name, _, knob = option.rpartition(".")
        hints = [typing.get_type_hints(type(method)) for method in start
                 if name.replace("_", "-") in ("", method.name)]
        hint = next((h[knob] for h in hints if knob in h), None)
        found[option] = text if hint is None else values.typed(knob, text, hint)
    return found


def title(settings: dict[str, Any] | None) -> str:
    """The names of a plan's methods."""
    if settings is None:
        return STOCK
    return " + ".join(entry["method"] for entry in settings["methods"])


def describe(settings: dict[str, Any] | None) -> str:
    """A plan in a few words, to go over a picture."""
    if settings is None:
        return STOCK
    return " + ".join(entry["method"] + (f" {entry['density']:g}" if "density" in entry else "")
                      for entry in settings["methods"])
