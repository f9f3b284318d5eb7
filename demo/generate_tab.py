"""The image tab and the video tab: a prompt on the left, stock beside fast on the right."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from fastdiff.demo import density, live, look, python_lines
from fastdiff.demo.house import House, told
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.shelf import Entry
from fastdiff.demo.wish import Wish, to_link, whole

EXAMPLES = {
    "image": ["a red apple on a blue background", "a green frog on a striped yellow background",
              "a rocket on a dotted purple background"],
    "video": ["a red apple moving left on a blue background",
              "a yellow sun growing on a purple background",
              "a sailboat moving right on a green background"],
}
_BUTTONS: Any = ["download", "fullscreen"]


class GenerateTab:
    """The components of one kind. `show` fills its fields in."""

    def __init__(self, kind: str, house: House, panel: MethodPanel) -> None:
        self.kind, self._house, self._panel = kind, house, panel
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._ask()
            with gr.Column(scale=7, min_width=420):
                self._tell()
        self._connect()

    def _ask(self) -> None:
        best, limits, kind = self._house.renderer.model.defaults, self._house.limits, self.kind
        known = self._house.renderer.model.shipped
        self.prompt = gr.Textbox(EXAMPLES[kind][0] if known else "", label="Prompt", lines=3,
                                 max_length=limits.prompt, elem_id=f"{kind}-prompt")
        if known:
            gr.Examples(EXAMPLES[kind], self.prompt, label="Try", cache_examples=False,
                        api_visibility="private")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, elem_id=f"{kind}-seed")
            self.steps = gr.Slider(1, limits.steps, best.steps or 20, step=1, label="Steps",
                                   elem_id=f"{kind}-steps")
        multiple = best.multiple or 8
        with gr.Row():
            self.height = _side("Height", best.height, multiple, limits.side, f"{kind}-height")
            self.width = _side("Width", best.width, multiple, limits.side, f"{kind}-width")
        rule = best.frame_factor or 1
        first = best.frames or 17
        self.frames = gr.Slider(
            1, limits.frames, first, step=rule, label="Frames", visible=kind == "video",
            info=f"{best.frames_rule}" if best.frames_rule else None, elem_id=f"{kind}-frames")
        with gr.Accordion("More", open=False):
            self.guidance = gr.Number(best.guidance, label="Guidance", elem_id=f"{kind}-guidance",
                                      info="How strictly to follow the prompt; empty: the model's")
            self.negative = gr.Textbox(label="Keep out", max_length=limits.prompt, max_lines=2,
                                       elem_id=f"{kind}-negative")
        self.compare = gr.Checkbox(True, label="Stock beside it",
                                   info="Runs twice with the same seed: without and with methods",
                                   elem_id=f"{kind}-compare")
        self.any_size = gr.Checkbox(
            kind == "image" and known, label="Sparse at any size", elem_id=f"{kind}-any",
            info="Also below the break-even, where it costs time: to see a method at work"
                 + (" (tiles of 2 by 2 tokens)" if kind == "image" else ""))
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id=f"{kind}-go")
            self.stop = gr.Button("Stop", variant="stop", elem_id=f"{kind}-stop")

    def _tell(self) -> None:
        kind = self.kind
        self.live = gr.HTML(live.note("Ready."), elem_id=f"{kind}-live")
        self.cards = gr.HTML(visible=False, elem_id=f"{kind}-cards")
        if kind == "image":
            self._pictures()
        else:
            self._clips()
        with gr.Group(visible=False) as self.more:
            with gr.Accordion("Density by layer and step", open=True):
                self.chart = gr.HTML(elem_id=f"{kind}-chart")
            with gr.Accordion("What ran", open=False):
                self.report = gr.Code(language=None, show_label=False, lines=4, max_lines=24,
                                      elem_id=f"{kind}-report")
            with gr.Accordion("The same in Python", open=False):
                self.code = gr.Code(language="python", show_label=False, elem_id=f"{kind}-code")
            with gr.Accordion("Files and link", open=False):
                self.files = gr.File(label="Settings are inside each file; the .json makes the "
                                     "result again (fastdiff generate --from)", interactive=False,
                                     file_count="multiple", elem_id=f"{kind}-files")
                self.link = gr.Textbox(label="Link to these settings", buttons=["copy"],
                                       interactive=False, elem_id=f"{kind}-link")

    def _pictures(self) -> None:
        self.one = gr.Image(visible=False, format="png", interactive=False, label="Result",
                            buttons=_BUTTONS, elem_id="image-one")
        with gr.Tabs(visible=False) as self.both:
            with gr.Tab("Swipe"):
                self.swipe = gr.ImageSlider(format="png", interactive=False, type="filepath",
                                            label="stock left, fast right", max_height=640,
                                            elem_id="image-swipe")
            with gr.Tab("Side by side"), gr.Row():
                self.stock = gr.Image(format="png", interactive=False, label="stock",
                                      buttons=_BUTTONS,
                                      elem_id="image-stock")
                self.fast = gr.Image(format="png", interactive=False, label="fast",
                                     buttons=_BUTTONS,
                                     elem_id="image-fast")
            with gr.Tab("Difference"):
                self.difference = gr.Image(format="png", interactive=False,
                                           label="error, largest channel", buttons=_BUTTONS,
                                           elem_id="image-difference")
                self.scale = gr.HTML()

    def _clips(self) -> None:
        self.one = gr.Video(visible=False, interactive=False, label="Result", loop=True,
                            elem_id="video-one")
        with gr.Column(visible=False, elem_classes="fd-clips") as self.both:
            with gr.Row():
                self.stock = gr.Video(interactive=False, label="stock", loop=True,
                                      elem_id="video-stock")
                self.fast = gr.Video(interactive=False, label="fast", loop=True,
                                     elem_id="video-fast")
                self.difference = gr.Video(interactive=False, label="difference", loop=True,
                                           elem_id="video-difference")
            gr.HTML(look.PLAY)
            self.scale = gr.HTML()

    @property
    def _fields(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "negative": self.negative, "seed": self.seed,
                "steps": self.steps, "guidance": self.guidance, "height": self.height,
                "width": self.width, "frames": self.frames, "compare": self.compare}

    @property
    def outputs(self) -> list[Any]:
        """What `show` may change."""
        return list(self._fields.values())

    def show(self, wish: Wish) -> dict[Any, Any]:
        """Updates that fill the fields in."""
        found = {name: getattr(wish, name) for name in self._fields}
        return {self._fields[name]: value for name, value in found.items() if value is not None}

    def wish(self, sent: Sequence[Any]) -> Wish:
        """What the page sent, as a wish."""
        count = len(self._fields)
        field = dict(zip(self._fields, sent[:count], strict=True))
        plan = self._panel.plan(sent[count + 1:])
        plan = at_any_size(plan, self.kind) if sent[count] else plan
        numbers = {name: whole(name, field[name])
                   for name in ("seed", "steps", "height", "width", "frames")}
        if self.kind == "image":
            numbers["frames"] = None
        return Wish(kind=self.kind, prompt=field["prompt"] or "", negative=field["negative"],
                    guidance=field["guidance"], compare=bool(field["compare"]),
                    plan=plan, **{**numbers, "seed": numbers["seed"] or 0})

    def _connect(self) -> None:
        results = [self.cards, self.one, self.both, self.stock, self.fast, self.difference,
                   self.scale, self.more, self.chart, self.report, self.code, self.files, self.link]
        if self.kind == "image":
            results.append(self.swipe)

        async def run(request: gr.Request, *sent: Any) -> AsyncIterator[dict[Any, Any]]:
            user = str(request.session_hash)
            async for state, entry in told(
                    self._house, lambda: self._house.ask(user, self.wish(sent))):
                found = {self.live: state}
                yield found if entry is None else {**found, **self._result(entry, request)}

        run.__name__ = self.kind
        gr.on([self.go.click, self.prompt.submit], run, [*self._fields.values(), self.any_size,
              *self._panel.inputs], [self.live, *results], show_progress="hidden",
              concurrency_limit=None, api_name=self.kind)

        def stop(request: gr.Request) -> None:
            self._house.worker.stop(str(request.session_hash))

        self.stop.click(stop, queue=False, show_progress="hidden", api_name=f"stop_{self.kind}")

    def _result(self, entry: Entry, request: gr.Request) -> dict[Any, Any]:
        paired = entry.facts is not None
        path = {name: str(file) for name, file in entry.files.items()}
        found = {
            self.cards: gr.HTML(live.cards(entry.facts, entry.record["seconds"],
                                           entry.record["report"]), visible=True),
            self.one: _media(self.kind)(None if paired else path["fast"], visible=not paired),
            self.both: _box(self.kind)(visible=paired),
            self.stock: path.get("stock"), self.fast: path["fast"] if paired else None,
            self.difference: path.get("difference"),
            self.scale: _scale(entry.facts) if entry.facts else "",
            self.more: gr.Group(visible=True),
            self.chart: density.chart(entry.table) if entry.table else density.NONE,
            self.report: entry.told,
            self.code: python_lines.lines(entry.settings, self._house.renderer.pipe),
            self.files: list(path.values()),
            self.link: _link(request, entry.wish),
        }
        if self.kind == "image":
            found[self.swipe] = (path["stock"], path["fast"]) if paired else None
        return found


def at_any_size(plan: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
    """The plan without the break-even of the device, where the user has not set one.

    A small picture is cut into tiles of 2 by 2 tokens, so that there is something to choose from.
    """
    if plan is None:
        return None
    free: dict[str, Any] = {"min_tokens": 1, "max_density": 1.0}
    if kind == "image":
        free["tile"] = (1, 2, 2)
    return {**plan, "methods": [
        {**entry, **{name: value for name, value in free.items()
                     if name in entry and entry[name] is None}} for entry in plan["methods"]]}


def _side(label: str, best: int | None, multiple: int, most: int, name: str) -> Any:
    # bounds are checked with the rest, so that they are told in the same place
    return gr.Number(best, label=f"{label}, up to {most}", step=multiple, precision=0, elem_id=name)


def _media(kind: str) -> Any:
    return gr.Image if kind == "image" else gr.Video


def _box(kind: str) -> Any:
    return gr.Tabs if kind == "image" else gr.Column


def _scale(facts: dict[str, Any]) -> str:
    if facts["psnr"] is None:
        return "<p class='fd-note'>The two are equal, so the difference is black.</p>"
    white = facts["difference_white"]
    return (f"<p class='fd-note'>White is an error of {white * 255:.0f} of 255 in a channel; "
            "black is none.</p>")


def _link(request: gr.Request, wish: Wish) -> str:
    home = str(request.headers.get("origin") or request.headers.get("host") or "")
    home = home if home.startswith("http") else f"http://{home}"
    return f"{home}/?s={to_link(wish)}"

