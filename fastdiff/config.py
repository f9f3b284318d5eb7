"""Presets and plans: from names and files to policies."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from fastdiff.policies import Policy, methods

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"method": "tile-sparse", "density": 0.3, "dense_steps": 0.35},
    "balanced": {"method": "tile-sparse", "density": 0.25, "dense_steps": 0.2},
    "turbo": {"method": "tile-sparse", "density": 0.15, "dense_steps": 0.1},
}
DEFAULT = "balanced"


def nearest(word: str, known: list[str]) -> str:
    """A sentence part that names the nearest accepted words."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Accepted: {', '.join(known)}"


def make_policy(method: str | Policy | None, options: dict[str, Any]) -> Policy:
    """A policy from a preset or method name and options, or a policy with options replaced."""
    if isinstance(method, Policy):
        return _replace(method, options)
    settings = dict(PRESETS.get(method or DEFAULT, {"method": method}))
    known = methods()
    name = settings.pop("method")
    if name not in known:
        raise ValueError(f"unknown method {name!r}: {nearest(str(name), [*PRESETS, *known])}")
    _check_options(known[name], options)
    try:
        return known[name](**{**settings, **options})
    except TypeError as error:
        raise ValueError(f"an option of {name} has the wrong type: {error}") from None


def _replace(policy: Policy, options: dict[str, Any]) -> Policy:
    _check_options(type(policy), options)
    return dataclasses.replace(policy, **options)


def _check_options(cls: type[Policy], options: dict[str, Any]) -> None:
    fields = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in fields:
            raise ValueError(f"{cls.name} has no option {option!r}: {nearest(option, fields)}")


def to_plan(policy: Policy) -> dict[str, Any]:
    """A plan: the method and its options as plain JSON data."""
    return {"fastdiff_plan": 1, **policy.to_dict()}


def from_plan(plan: str | Path | dict[str, Any]) -> Policy:
    """Read a plan from a dict or a JSON file."""
    if isinstance(plan, (str, Path)):
        path = Path(plan)
        if not path.is_file():
            raise ValueError(f"plan file {str(path)!r} does not exist")
        try:
            plan = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"plan file {str(path)!r} is not JSON: {error}") from None
    if not isinstance(plan, dict) or plan.get("fastdiff_plan") != 1:
        raise ValueError("not a plan: expected an object with \"fastdiff_plan\": 1")
    options = {k: v for k, v in plan.items() if k not in ("fastdiff_plan", "method")}
    return make_policy(plan.get("method"), options)
