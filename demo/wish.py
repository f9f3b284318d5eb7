"""Wish: what a visitor asked for, as the page sends it; nothing in it is trusted."""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastdiff.cli.errors import InputError
from fastdiff.config import from_plan, to_plan
from fastdiff.demo.limits import Limits

KINDS = ("image", "video")
SEEDS = 2**32 - 1


@dataclass(frozen=True)
class Wish:
    """One picture or clip. plan: methods with all their options, None for stock.

    compare: also run stock with the same seed. None leaves the model's best value in place.
    """

    kind: str
    prompt: str
    negative: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    plan: dict[str, Any] | None = None
    compare: bool = True

    def check(self, limits: Limits) -> "Wish":
        """Itself, when every value lies in the bounds; else an InputError with a sentence."""
        if self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r}: accepted are {' and '.join(KINDS)}")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InputError("the prompt is empty: say what to show")
        for text in (self.prompt, self.negative or ""):
            if len(text) > limits.prompt:
                raise InputError(f"the text has {len(text)} characters: accepted are up to "
                                 f"{limits.prompt}")
        limits.check("seed", self.seed, 0, SEEDS)
        limits.check("steps", self.steps, 1, limits.steps)
        limits.check("height", self.height, 8, limits.side)
        limits.check("width", self.width, 8, limits.side)
        limits.check("frames", self.frames, 1, limits.frames)
        guidance = self.guidance
        if guidance is not None and not 0 <= guidance <= 50:
            raise InputError(f"guidance {guidance!r} is not possible here: accepted is 0 to 50")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Settings by name, as the command line takes them."""
        found = {"negative": self.negative or None, "seed": self.seed, "steps": self.steps,
                 "guidance": self.guidance, "height": self.height, "width": self.width,
                 "frames": self.frames if self.kind == "video" else None}
        return {name: value for name, value in found.items() if value is not None}


def whole(name: str, value: Any) -> int | None:
    """A whole number from a number field; None from an empty one."""
    if value is None or value == "":
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value != int(value):
        raise InputError(f"{name} {value!r} is not a whole number")
    return int(value)


def of_record(record: Mapping[str, Any]) -> Wish:
    """The wish that a sidecar or a link came from; its types are checked, its bounds are not."""
    kinds = {"kind": str, "prompt": str, "negative": str, "seed": int, "steps": int,
             "guidance": (int, float), "height": int, "width": int, "frames": int, "plan": dict,
             "compare": bool}
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = record.get(name)
        if name == "compare" and isinstance(value, dict):
            value = True  # a sidecar has the figures there
        if value is not None and (not isinstance(value, kind)
                                  or (isinstance(value, bool) and kind is not bool)):
            raise InputError(f"the settings have a {name} of the wrong type")
        if value is not None:
            found[name] = value
    if found.get("kind") == "image":
        found.pop("frames", None)
    if "plan" in found:
        try:
            found["plan"] = to_plan(from_plan(found["plan"]))
        except TypeError as error:
            raise InputError(f"the plan has a value of the wrong type: {error}") from None
    try:
        return Wish(**found)
    except TypeError:
        raise InputError("the settings lack a prompt or a kind") from None


def to_link(wish: Wish) -> str:
    """The value of `?s=` that fills the page in with this wish."""
    best = {f.name: f.default for f in fields(Wish)}
    data = {name: value for name, value in asdict(wish).items() if value != best[name]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def of_link(text: str) -> Wish:
    """The wish in a link."""
    try:
        data = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        raise InputError("the link does not hold settings") from None
    if not isinstance(data, dict):
        raise InputError("the link does not hold settings")
    return of_record(data)
