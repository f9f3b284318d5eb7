"""The method panel: one field for every knob of every registered method, with its documentation."""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from fastdiff.cli import values
from fastdiff.cli.errors import InputError
from fastdiff.cli.methods import option_notes
from fastdiff.config import DEFAULT, PRESETS, make_methods, methods, to_plan
from fastdiff.method import KINDS, Method

STOCK = "stock"
NONE = "none"
# one attention and one sampling method at a time
_SINGLE = ("attention", "sampling")
# the preset whose values the fields hold, or none
_MARK = """(...now) => Object.entries(%s).find(([name, values]) => values.every(
  (value, i) => value === null || JSON.stringify(value) === JSON.stringify(now[i])
))?.[0] ?? null"""


@dataclasses.dataclass(frozen=True)
class Knob:
    """A field of a method's dataclass: what it is called, may hold, and means."""

    method: str
    name: str
    hint: Any
    default: Any
    about: str

    @property
    def flag(self) -> bool:
        return self.hint is bool

    def shown(self, value: Any) -> Any:
        """A value as its field shows it."""
        if self.flag:
            return bool(value)
        if value is None:
            return "auto"
        return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)

    def read(self, shown: Any) -> Any:
        """The value of a field, or an InputError that says what is accepted."""
        if self.flag:
            return bool(shown)
        text = "" if shown is None else str(shown).strip()
        if len(text) > 200:
            raise InputError(f"{self.method}: the value of {self.name} is too long")
        if text == "" or text == self.shown(self.default):
            return self.default
        try:
            return values.typed(self.name, text, self.hint)
        except InputError as error:
            raise InputError(f"{self.method}: {error}") from None
        except (TypeError, ValueError):
            raise InputError(f"{self.method}: {self.name}={text!r} is not possible") from None


def knobs(cls: type[Method]) -> list[Knob]:
    """The knobs that can be typed in; documentation from the docstrings of class and parents."""
    notes: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        notes.update(option_notes(parent.__doc__ or ""))
    hints = typing.get_type_hints(cls)
    return [Knob(cls.name, field.name, hints[field.name], field.default, notes.get(field.name, ""))
            for field in dataclasses.fields(cls) if _typeable(hints[field.name])]


def _typeable(hint: Any) -> bool:
    """Whether a value can be typed in: words, numbers, and tuples of them."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return all(_typeable(part) for part in inner)
    return hint in (bool, int, float, str, types.NoneType)


def about(cls: type[Method]) -> str:
    """The method's documentation without its list of knobs, as Markdown."""
    paragraphs = inspect.cleandoc(cls.__doc__ or cls.summary).split("\n\n")
    return "\n\n".join(part for part in paragraphs if not option_notes(part.partition("\n")[0]))


def plan_of(names: Sequence[str], shown: Mapping[tuple[str, str], Any]) -> dict[str, Any] | None:
    """The plan of the chosen methods; None when none is chosen.

    shown: values of fields by (method, knob), as the page sent them.
    """
    known = methods()
    made = []
    for name in names:
        if name not in known:
            raise InputError(f"unknown method {name!r}: accepted are {', '.join(known)}")
        given = {knob.name: knob.read(shown[name, knob.name]) for knob in knobs(known[name])
                 if (name, knob.name) in shown}
        # one preset of a method may change what its other knobs mean by default
        given = {knob.name: given[knob.name] for knob in knobs(known[name])
                 if given.get(knob.name, knob.default) != knob.default}
        made += make_methods([name], {f"{name}.{knob}": value for knob, value in given.items()})
    return to_plan(make_methods(made, {})) if made else None


class MethodPanel:
    """The components. `inputs` go to an event; `plan` reads what they sent."""

    def __init__(self, preset: str = DEFAULT) -> None:
        self._known = methods()
        self._knobs = {(knob.method, knob.name): knob
                       for cls in self._known.values() for knob in knobs(cls)}
        start = make_methods([preset], {})
        on = [method.name for method in start]
        self.preset = gr.Radio([STOCK, *PRESETS], value=preset, label="Preset", elem_id="preset")
        self._picks: dict[str, Any] = {}
        for kind in KINDS:
            names = [name for name, cls in self._known.items() if cls.kind == kind]
            if names:
                self._picks[kind] = _pick(kind, names, [name for name in on if name in names])
        self._fields: dict[tuple[str, str], Any] = {}
        self._homes: dict[str, gr.Accordion] = {}
        given = {method.name: method.to_dict() for method in start}
        for name, cls in self._known.items():
            with gr.Accordion(name, open=False, visible=name in on,
                              elem_id=f"method-{name}") as self._homes[name]:
                first, _, rest = about(cls).partition("\n\n")
                gr.Markdown(first, elem_classes="fd-about")
                if rest:
                    with gr.Accordion("How it works, cost, limits", open=False):
                        gr.Markdown(rest, elem_classes="fd-about")
                for knob in knobs(cls):
                    value = given.get(name, {}).get(knob.name, knob.default)
                    self._fields[name, knob.name] = _field(knob, value)
        self._connect()

    @property
    def inputs(self) -> list[Any]:
        return [*self._picks.values(), *self._fields.values()]

    def plan(self, sent: Sequence[Any]) -> dict[str, Any] | None:
        """The plan in the values of `inputs`, in their order."""
        picks = sent[:len(self._picks)]
        names = _names(picks)
        if not all(isinstance(name, str) for name in names):
            raise InputError("methods are chosen by name")
        return plan_of(names, dict(zip(self._fields, sent[len(self._picks):], strict=True)))

    def plan_with(self, names: Sequence[str], sent: Sequence[Any]) -> dict[str, Any]:
        """The plan of these methods, with their options as sent."""
        shown = dict(zip(self._fields, sent[len(self._picks):], strict=True))
        return plan_of(names, shown) or to_plan(())

    def check(self, plan: dict[str, Any] | None) -> None:
        """Refuse a plan that holds what the panel has no field for; it would be lost in silence."""
        for entry in (plan or {}).get("methods", []):
            best = to_plan(make_methods([entry["method"]], {}))["methods"][0]
            lost = [name for name, value in entry.items()
                    if value != best[name] and name != "method"
                    and (entry["method"], name) not in self._fields]
            if lost:
                raise InputError(f"the settings hold {entry['method']}.{lost[0]}, which this page "
                                 "has no field for: fastdiff generate --from makes the result")

    def show(self, plan: dict[str, Any] | None) -> dict[Any, Any]:
        """Updates that fill the panel in with a plan."""
        entries = {entry["method"]: entry for entry in (plan or {}).get("methods", [])}
        found: dict[Any, Any] = {self.preset: _preset(plan)}
        for kind, pick in self._picks.items():
            on = [n for n in entries if n in self._known and self._known[n].kind == kind]
            found[pick] = (on or [NONE])[0] if kind in _SINGLE else on
        for name, home in self._homes.items():
            found[home] = gr.Accordion(visible=name in entries)
        for (name, knob), field in self._fields.items():
            if knob in entries.get(name, {}):
                found[field] = self._knobs[name, knob].shown(entries[name][knob])
        return found

    @property
    def outputs(self) -> list[Any]:
        """What `show` may change."""
        return [self.preset, *self._picks.values(), *self._homes.values(), *self._fields.values()]

    def _connect(self) -> None:
        def by_preset(preset: str) -> dict[Any, Any]:
            return self.show(_plan_of_preset(preset))

        def by_pick(*picks: Any) -> dict[Any, Any]:
            on = set(_names(picks))
            # what is chosen by hand is no preset any more
            homes = {home: gr.Accordion(visible=name in on) for name, home in self._homes.items()}
            return {**homes, self.preset: gr.Radio(value=None if on else STOCK)}

        self.preset.input(by_preset, [self.preset], self.outputs, show_progress="hidden",
                          api_visibility="private")
        picks = list(self._picks.values())
        for pick in picks:
            pick.input(by_pick, picks, [self.preset, *self._homes.values()],
                       show_progress="hidden", api_visibility="private")
        # gradio's `input` of a text field misses what is pasted or deleted, and `change` has what a
        # preset fills in, too: so the values tell. In the browser, as keys need no server.
        rows = {name: self.show(_plan_of_preset(name)) for name in [STOCK, *PRESETS]}
        fields = [field for field in self._fields.values()
                  if any(field in row for row in rows.values())]
        told = {name: [row.get(part) for part in picks + fields] for name, row in rows.items()}
        gr.on([field.change for field in fields], None, picks + fields, [self.preset],
              js=_MARK % json.dumps(told), show_progress="hidden", api_visibility="private")


def _pick(kind: str, names: list[str], on: list[str]) -> Any:
    title, name = kind.capitalize(), f"pick-{kind}"
    if kind in _SINGLE:
        return gr.Radio([NONE, *names], value=(on or [NONE])[0], label=title, elem_id=name)
    return gr.CheckboxGroup(names, value=on, label=title, elem_id=name)


def _names(picks: Sequence[Any]) -> list[Any]:
    """The chosen methods, from radios and groups."""
    found = [name for pick in picks for name in (pick if isinstance(pick, list) else [pick])]
    return [name for name in found if name is not None and name != NONE]


def _preset(plan: dict[str, Any] | None) -> str | None:
    """The preset that a plan is, or None."""
    if plan is None:
        return STOCK
    return next((name for name in PRESETS if _plan_of_preset(name) == plan), None)


def _plan_of_preset(name: str) -> dict[str, Any] | None:
    return None if name == STOCK else to_plan(make_methods([name], {}))


def _field(knob: Knob, value: Any) -> Any:
    label = f"{knob.method}.{knob.name}"
    if knob.flag:
        return gr.Checkbox(bool(value), label=knob.name, info=knob.about, elem_id=f"knob-{label}")
    return gr.Textbox(knob.shown(value), label=knob.name, info=knob.about, max_lines=1,
                      elem_id=f"knob-{label}")
