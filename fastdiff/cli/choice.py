"""From method, plan and options on the command line to a plan: the method with all its options."""

import typing
from pathlib import Path
from typing import Any

from fastdiff.cli import values
from fastdiff.cli.errors import InputError, nearest

STOCK = "stock"


def plan(
    method: str | None, file: Path | None, options: dict[str, str], before: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The plan to run with; None is stock.

    file: a plan file. options: knobs as typed. before: the plan of a sidecar, which `method` and
    `file` replace and `options` change.
    """
    from fastdiff.config import PRESETS, from_plan, make_policy, to_plan
    from fastdiff.policies import methods

    if method == STOCK:
        if options or file is not None:
            given = "--plan" if file is not None else f"--{next(iter(options)).replace('_', '-')}"
            raise InputError(f"{given} needs a method other than {STOCK}")
        return None
    if method is not None and file is not None:
        raise InputError("give either --method or --plan, not both")
    known = [STOCK, *PRESETS, *methods()]
    if method is not None and method not in known:
        raise InputError(f"unknown method {method!r}: {nearest(method, known)}")
    source = file if file is not None else before if method is None else None
    try:
        policy = make_policy(method, {}) if source is None else from_plan(source)
        hints = typing.get_type_hints(type(policy))
        typed = {name: values.typed(name, text, hints[name]) if name in hints else text
                 for name, text in options.items()}
        return to_plan(make_policy(policy, typed))
    except TypeError as error:
        raise InputError(f"the plan has a value of the wrong type: {error}") from error


def describe(settings: dict[str, Any] | None) -> str:
    """A plan in a few words, to go over a picture."""
    if settings is None:
        return STOCK
    return f"{settings['method']} {settings['density']:g}"
