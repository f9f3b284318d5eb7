"""Presets and plans: from names, options and files to methods."""

import dataclasses
import difflib
import importlib
import json
import pkgutil
import types
import typing
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

from fastdiff.method import KINDS, REGISTRY, Method, check

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"method": "tile-sparse", "density": 0.3, "dense_steps": 0.35},
    "balanced": {"method": "tile-sparse", "density": 0.25, "dense_steps": 0.2},
    # the pooled tail helps at 0.25 and hurts at 0.1: docs/tile-sparse.md
    "turbo": {"method": "tile-sparse", "density": 0.15, "dense_steps": 0.1, "tail": False},
}
DEFAULT = "balanced"
# one file a method in each of these
HOMES = ("fastdiff.policies", "fastdiff.tokens", "fastdiff.pipelines")


def methods() -> dict[str, type[Method]]:
    """Every registered method by name; imports each file of their homes once."""
    for home in HOMES:
        spec = find_spec(home)
        if spec is not None:
            for module in pkgutil.iter_modules(spec.submodule_search_locations):
                importlib.import_module(f"{home}.{module.name}")
    return dict(sorted(REGISTRY.items()))


def nearest(word: str, known: list[str]) -> str:
    """A sentence part that names the nearest accepted words."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Accepted: {', '.join(known)}"


def make_methods(
    given: Sequence[str | Method], options: dict[str, Any], check_kinds: bool = True
) -> tuple[Method, ...]:
    """Methods from preset names, method names and methods; nothing means the default preset.

    options: a knob goes to the method that has it; where several have it, or to be plain, write
    "name.knob".
    """
    found = [_start(method) for method in (given or [DEFAULT])]
    changes = _shared_out(options, [cls for cls, _ in found])
    made = tuple(_make(cls, {**settings, **changed})
                 for (cls, settings), changed in zip(found, changes, strict=True))
    for kind in ("attention", "sampling"):
        same = [method.name for method in made if method.kind == kind]
        if len(same) > 1:
            raise ValueError(f"one {kind} method at a time, got {len(same)}: {', '.join(same)}")
    names = [method.name for method in made]
    if len({*names}) < len(names):
        raise ValueError(f"each method once, got {', '.join(names)}")
    return tuple(sorted(made, key=lambda method: KINDS.index(method.kind)))


def _start(method: str | Method) -> tuple[type[Method], dict[str, Any]]:
    if isinstance(method, Method):
        fields = dataclasses.fields(method)
        return type(method), {f.name: getattr(method, f.name) for f in fields}
    if not isinstance(method, str):
        wanted = (f"{method.__name__}()" if isinstance(method, type) else
                  "each as an argument of its own" if isinstance(method, (list, tuple)) else
                  'such as "balanced" or TileSparse(density=0.2)')
        raise ValueError(f"{method!r} is no method: pass names or methods, {wanted}")
    known = methods()
    settings = dict(PRESETS.get(method, {"method": method}))
    name = settings.pop("method")
    if name not in known:
        raise ValueError(f"unknown method {name!r}: {nearest(str(name), [*PRESETS, *known])}")
    return known[name], settings


def _shared_out(options: dict[str, Any], classes: list[type[Method]]) -> list[dict[str, Any]]:
    """The options of each class; a knob that none has, or several have, is refused."""
    shares: list[dict[str, Any]] = [{} for _ in classes]
    for option, value in options.items():
        name, dot, knob = option.rpartition(".")
        name = name.replace("_", "-")
        fit = [i for i, cls in enumerate(classes)
               if knob in _knobs(cls) and name in ("", cls.name)]
        if not fit:
            of = [cls for cls in classes if name in ("", cls.name)]
            if not of:
                raise ValueError(f"{option!r} names a method that is not on: "
                                 f"{nearest(name, [cls.name for cls in classes])}")
            raise ValueError(f"{' and '.join(cls.name for cls in of)} has no option {knob!r}: "
                             f"{nearest(knob, [k for cls in of for k in _knobs(cls)])}")
        if len(fit) > 1:
            both = " or ".join(f"{classes[i].name}.{knob}" for i in fit)
            raise ValueError(f"several methods have an option {knob!r}: write {both}")
        shares[fit[0]][knob] = value
    return shares


def _knobs(cls: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _make(cls: type[Method], settings: dict[str, Any]) -> Method:
    for field in dataclasses.fields(cls):
        if field.name in settings:
            _check_type(field.name, settings[field.name], field.type)
    try:
        return cls(**settings)
    except TypeError as error:
        raise ValueError(f"an option of {cls.name} has the wrong type: {error}") from None


# words for a field's type, and whether a value is of it
_TYPES: dict[Any, tuple[str, Any]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: _counts(value, Integral)),
    float: ("a number", lambda value: _counts(value, Real) and value == value),
    str: ("a word", lambda value: isinstance(value, (str, PathLike))),
    types.NoneType: ("None", lambda value: value is None),
    tuple: ("a tuple of numbers", lambda value: isinstance(value, (tuple, list))),
}


def _counts(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_type(knob: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than the field's; a type of the method's own it checks."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = [typing.get_origin(member) or member
               for member in (typing.get_args(hint) if union else (hint,))]
    if all(member in _TYPES for member in members):
        fits = any(_TYPES[member][1](value) for member in members)
        # every whole number is a number
        said = [member for member in members if member is not int or float not in members]
        words = dict.fromkeys(_TYPES[member][0] for member in said)
        check(fits, knob, value, " or ".join(words))


def to_plan(given: Sequence[Method]) -> dict[str, Any]:
    """A plan: methods and their options as plain JSON data."""
    return {"fastdiff_plan": 1, "methods": [method.to_dict() for method in given]}


def from_plan(plan: str | PathLike[str] | dict[str, Any]) -> tuple[Method, ...]:
    """Read a plan from a dict or a JSON file."""
    if isinstance(plan, (str, PathLike)):
        path = Path(plan)
        if not path.is_file():
            missing = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"plan file {str(path)!r} {missing}")
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"plan file {str(path)!r} is not JSON: {error}") from None
    version = plan.get("fastdiff_plan") if isinstance(plan, dict) else None
    if isinstance(version, int) and version > 1:
        raise ValueError(f"a plan of version {version}, and this FastDiff reads version 1: update "
                         "it (pip install -U diffusers-fastdiff), or calibrate again")
    if not isinstance(plan, dict) or version != 1:
        raise ValueError("not a plan: expected an object with \"fastdiff_plan\": 1")
    entries = plan.get("methods")
    if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("method"), str) for entry in entries):
        raise ValueError("not a plan: \"methods\" is a list of objects with a \"method\" each")
    made = []
    for entry in entries:
        options = {f"{entry['method']}.{k}": v for k, v in entry.items() if k != "method"}
        made += make_methods([entry["method"]], options)
    return make_methods(made, {}) if made else ()
