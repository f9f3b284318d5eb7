"""`fastdiff methods`: presets, methods, and the options of each."""

import dataclasses
import inspect
import json
import re
import typing
from typing import Annotated, Any

import typer


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List presets and methods with their options."""
    from fastdiff.config import DEFAULT, PRESETS
    from fastdiff.config import methods as registered

    found = {
        "default": DEFAULT,
        "presets": PRESETS,
        "methods": {name: _method(cls) for name, cls in registered().items()},
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)


def _method(cls: type) -> dict[str, Any]:
    notes: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        notes.update(option_notes(parent.__doc__ or ""))
    hints = typing.get_type_hints(cls)
    options = {
        f.name: {"type": _type_name(hints[f.name]), "default": _default(f),
                 "about": notes.get(f.name, "")}
        for f in dataclasses.fields(cls)
    }
    return {"kind": getattr(cls, "kind", ""), "summary": getattr(cls, "summary", ""),
            "options": options}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def option_notes(doc: str) -> dict[str, str]:
    """"name: text" and "one, two: text" paragraphs of a docstring, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(doc).splitlines():
        start = re.match(r"([a-z_]+(?:, [a-z_]+)*): (.+)", line)
        if start:
            names = start.group(1).split(", ")
            found.update(dict.fromkeys(names, start.group(2)))
        elif line.startswith("    ") and names:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        else:
            names = []
    return found


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("preset", "is", box=None)
    for name, settings in found["presets"].items():
        options = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "method")
        default = " (default)" if name == found["default"] else ""
        table.add_row(name, f"{settings['method']} with {options}{default}")
    console.print(table)
    for name, method in found["methods"].items():
        console.print(f"\n[bold]{name}[/bold]  ({method['kind']})  {method['summary']}")
        table = Table("  option", "default", "about", box=None)
        for option, about in method["options"].items():
            table.add_row(f"  {option}", str(about["default"]), about["about"])
        console.print(table)
    console.print("\nSet options by --density, --dense-steps and so on, or --option name=value;\n"
                  "--method a+b combines methods, --option a.name=value says whose.",
                  style="dim")
