"""From words on the command line to values: sizes, tiles, method options."""

import types
import typing
from typing import Any

from fastdiff.cli.errors import InputError, nearest

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
          "bfloat16": "bfloat16", "bf16": "bfloat16"}


def size(text: str, option: str = "--size") -> tuple[int, int]:
    """(height, width) from "HEIGHTxWIDTH", or from one number for a square."""
    parts = text.lower().replace("×", "x").split("x")
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    if len(numbers) != len(parts) or len(parts) not in (1, 2) or min(numbers, default=0) < 1:
        raise InputError(f"{option} {text!r} is not a size: give HEIGHTxWIDTH in pixels, such as "
                         "256x384, or one number for a square")
    return numbers[0], numbers[-1]


def pair(text: str) -> tuple[str, str]:
    """("name", "value") from "name=value"."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--option {text!r} is not name=value; `fastdiff methods` lists the names")
    return name.strip().replace("-", "_"), value.strip()


def writable(name: str, text: str) -> str:
    """`text`, if it can be written down: no half of a character, no zero byte."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} {text!a} is not text: character {error.start + 1} is half of one "
                         "(an emoji that was cut in two, or bytes that are not UTF-8)") from None
    if "\0" in text:
        raise InputError(f"{name} {text!a} is not text: it holds a zero byte")
    return text


def typed(name: str, text: str, hint: Any) -> Any:
    """`text` as the type of a dataclass field: a union is tried from the strictest member on."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    if types.NoneType in members and text.lower() in ("none", "auto"):
        return None
    order = sorted((m for m in members if m is not types.NoneType), key=_strictness)
    for member in order:
        try:
            # beside fractions 1.0 is all, and 1 is one
            return _whole(text) if member is int and float not in members else _one(text, member)
        except ValueError:
            continue
    accepted = " or ".join(dict.fromkeys(_words(member) for member in members))
    raise InputError(f"{name}={text!r} is not possible: accepted is {accepted}")


def _whole(text: str) -> int:
    """A whole number, also with the ".0" that it has in a table with empty cells."""
    head, _, zeros = text.partition(".")
    return int(head if zeros and not zeros.strip("0") else text)


def _strictness(member: Any) -> int:
    order = (bool, int, float, str)
    return order.index(member) if member in order else -1


def _one(text: str, member: Any) -> Any:
    if member is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(text)
        return text.lower() in _TRUE
    if typing.get_origin(member) is tuple:
        parts = text.strip("()[] ").replace("x", ",").split(",")
        kinds = typing.get_args(member)
        if len(parts) != len(kinds):
            raise ValueError(text)
        return tuple(_whole(part.strip()) if kind is int else kind(part)
                     for kind, part in zip(kinds, parts, strict=True))
    if typing.get_origin(member) is not None:
        raise ValueError(text)  # a list of something: only its form in words can be typed
    return member(text)


def _words(member: Any) -> str:
    if typing.get_origin(member) is tuple:
        return f"{len(typing.get_args(member))} whole numbers such as 4,4,8"
    return {bool: "yes or no", int: "a whole number", float: "a number", str: "a word",
            types.NoneType: "none"}.get(member, str(member))


def dtype(text: str) -> str:
    if text.lower() not in DTYPES:
        raise InputError(f"unknown --dtype {text!r}: {nearest(text.lower(), list(DTYPES))}")
    return DTYPES[text.lower()]


def device(text: str) -> str:
    """A device that this machine has; "auto" is the GPU where there is one."""
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = text.partition(":")[0]
    here = {"cpu": True, "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    usable = ["auto", *(name for name, there in here.items() if there)]
    try:
        index = torch.device(text).index or 0
    except RuntimeError:
        index = -1
    if kind not in usable or index < 0 or (kind == "cuda" and index >= torch.cuda.device_count()):
        raise InputError(f"no device {text!r} on this machine: accepted are {', '.join(usable)}")
    return text
