"""The masks tab: which tiles a head attends to, drawn on the frame, beside the true mass."""

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from threading import Lock
from typing import Any

import gradio as gr
import numpy as np

from fastdiff.cli.errors import InputError
from fastdiff.config import from_plan, methods
from fastdiff.demo import live, mask_picture
from fastdiff.demo.generate_tab import EXAMPLES
from fastdiff.demo.house import House, told
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.recording import Place, Recording, share
from fastdiff.demo.wish import Wish, whole
from fastdiff.demo.worker import Ticket
from fastdiff.policies import Policy

MOST_RECORDINGS, RECORDED_STEPS = 8, 4
LEGEND = ("<div class='fd-legend'><span><i style='background:#ffd60a'></i>tile of queries: click a "
          "frame to choose it</span><span><i style='background:#3b82f6'></i>tiles of keys that are "
          "kept</span><span><i style='background:linear-gradient(90deg,#0a071e,#c43d4e,#fcffa4);"
          "width:52px'></i>true attention mass, from none to most</span></div>")


class MasksTab:
    """The components, the recordings of the last visitors, and the events."""

    def __init__(self, house: House, panel: MethodPanel) -> None:
        self._house, self._panel = house, panel
        self._kept: OrderedDict[str, Recording] = OrderedDict()
        self._lock = Lock()
        self._policies = [name for name, cls in methods().items() if issubclass(cls, Policy)]
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self._ask()
            with gr.Column(scale=8, min_width=480):
                self._tell()
        self._connect()

    def _ask(self) -> None:
        kinds, shipped = self._house.renderer.kinds, self._house.renderer.model.shipped
        self.prompt = gr.Textbox(EXAMPLES["image"][0] if shipped else "", lines=2, label="Prompt",
                                 elem_id="masks-prompt")
        self.kind = gr.Radio(list(kinds), value=kinds[0], label="Make", elem_id="masks-kind")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, elem_id="masks-seed")
            self.steps = gr.Slider(1, 20, 8, step=1, label="Steps", elem_id="masks-steps")
        best = self._house.renderer.model.defaults
        self.frames = gr.Slider(1, self._house.limits.frames, min(best.frames or 9, 9),
                                step=best.frame_factor or 1, label="Frames of a clip",
                                elem_id="masks-frames")
        first = [name for name in ("tile-sparse", "random-blocks") if name in self._policies]
        self.methods = gr.CheckboxGroup(self._policies, value=first, label="Methods to ask",
                                        info="With their options in the panel",
                                        elem_id="masks-methods")
        with gr.Row():
            self.go = gr.Button("Record", variant="primary", elem_id="masks-go")
            self.stop = gr.Button("Stop", variant="stop", elem_id="masks-stop")
        gr.Markdown("The run stays dense, so that every method is asked about the same queries and "
                    "keys. `dense_steps`, `min_tokens` and `max_density` do not apply.",
                    elem_classes="fd-about")

    def _tell(self) -> None:
        self.live = gr.HTML(live.note("Ready."), elem_id="masks-live")
        with gr.Column(visible=False) as self.view:
            with gr.Row():
                self.method = gr.Radio([], label="Method", elem_id="masks-method")
                self.layer = gr.Dropdown([], label="Layer", elem_id="masks-layer")
                self.step = gr.Dropdown([], label="Step", elem_id="masks-step")
                self.head = gr.Dropdown([], label="Head", elem_id="masks-head")
            self.query = gr.Slider(0, 1, 0, step=1, label="Tile of queries", elem_id="masks-query")
            self.figures = gr.HTML(elem_id="masks-figures")
            gr.HTML(LEGEND)
            with gr.Row():
                self.kept = _picture("What is kept", "masks-kept")
                self.mass = _picture("True attention mass", "masks-mass")
            with gr.Accordion("All tiles: a row a tile of queries, a column a tile of keys",
                              open=False), gr.Row():
                self.kept_map = _picture("What is kept", "masks-kept-map")
                self.mass_map = _picture("True attention mass, log scale", "masks-mass-map")

    def record(self, wish: Wish, policies: dict[str, Policy], ticket: Ticket) -> Recording:
        """Run dense and record, in the worker's thread."""
        count = wish.steps or 1
        steps = np.linspace(0, count - 1, min(count, RECORDED_STEPS)).round().astype(int)
        recording = Recording(policies, frozenset(steps.tolist()))
        self._house.renderer.record(wish, recording, ticket)
        if not recording.places:
            why = "; ".join(f"{name}: {text}" for name, text in recording.refused.items())
            raise InputError(f"nothing could be recorded ({why or 'no attention call was seen'})")
        return recording

    def _connect(self) -> None:
        shown = [self.method, self.layer, self.step, self.head, self.query]
        drawn = [self.figures, self.kept, self.mass, self.kept_map, self.mass_map, self.query]

        async def masks(
            request: gr.Request, prompt: Any, kind: str, seed: Any, steps: Any, frames: Any,
            names: Any, *sent: Any,
        ) -> AsyncIterator[dict[Any, Any]]:
            user = str(request.session_hash)

            def ask() -> Ticket:
                wish = Wish(kind=kind, prompt=prompt or "", seed=whole("seed", seed) or 0,
                            steps=whole("steps", steps), compare=False,
                            frames=whole("frames", frames) if kind == "video" else None)
                wish.check(self._house.limits)
                self._house.renderer.settings(wish)
                policies = self._chosen(names, sent)
                return self._house.worker.submit(
                    user, lambda ticket: self.record(wish, policies, ticket),
                    self._house.limits.seconds)

            async for state, recording in told(self._house, ask):
                found: dict[Any, Any] = {self.live: state}
                if recording is not None:
                    self._keep(user, recording)
                    found |= self._open(recording)
                yield found

        gr.on(self.go.click, masks, [self.prompt, self.kind, self.seed, self.steps, self.frames,
              self.methods, *self._panel.inputs], [self.live, self.view, *shown, *drawn[:-1]],
              show_progress="hidden", concurrency_limit=None, api_name="masks")

        def draw(request: gr.Request, *chosen: Any) -> dict[Any, Any]:
            recording = self._of(request)
            if recording is None:
                return {self.query: gr.skip()}
            return self._draw(recording, *chosen)

        for part in shown:
            part.input(draw, shown, drawn, show_progress="hidden", trigger_mode="always_last",
                       api_visibility="private")

        def click(request: gr.Request, event: gr.SelectData, *chosen: Any) -> dict[Any, Any]:
            recording = self._of(request)
            if recording is None:
                return {self.query: gr.skip()}
            place = _place(recording, *chosen[:3])
            x, y = event.index
            tile = mask_picture.sheet(place, recording.frames).tile_at(x, y)
            name, layer, step, head, _ = chosen
            if tile is None:
                return {self.query: gr.skip()}
            return self._draw(recording, name, layer, step, head, tile)

        for picture in (self.kept, self.mass):
            picture.select(click, shown, drawn, show_progress="hidden", api_visibility="private")

        def stop(request: gr.Request) -> None:
            self._house.worker.stop(str(request.session_hash))

        self.stop.click(stop, queue=False, show_progress="hidden", api_name="stop_masks")

    def _chosen(self, names: Any, sent: Sequence[Any]) -> dict[str, Policy]:
        found: dict[str, Policy] = {}
        for name in names or []:
            plan = self._panel.plan_with([name], sent)
            found |= {m.name: m for m in from_plan(plan) if isinstance(m, Policy)}
        if not found:
            raise InputError("choose at least one attention method to ask")
        return found

    def _open(self, recording: Recording) -> dict[Any, Any]:
        layers = sorted({layer for layer, _, _ in recording.places})
        steps = sorted({step for _, step, _ in recording.places})
        names = [name for name in recording.methods
                 if any(name == other for _, _, other in recording.places)]
        layer, step = layers[len(layers) // 2], steps[len(steps) // 2]
        place = _place(recording, names[0], layer, step)
        query = place.tiles.blocks // 2
        notes = [f"{name} cannot choose here: {why}" for name, why in recording.refused.items()]
        notes += ["Recording ended early, for memory."] * recording.full
        heads = list(range(place.mass.shape[0]))
        chosen = {
            self.live: live.note(" ".join(["Recorded.", *notes])),
            self.view: gr.Column(visible=True), self.method: gr.Radio(names, value=names[0]),
            self.layer: gr.Dropdown(layers, value=layer),
            self.step: gr.Dropdown([(str(n + 1), n) for n in steps], value=step),
            self.head: gr.Dropdown(heads, value=0),
        }
        return {**chosen, **self._draw(recording, names[0], layer, step, 0, query)}

    def _draw(
        self, recording: Recording, name: Any, layer: Any, step: Any, head: Any, query: Any
    ) -> dict[Any, Any]:
        place = _place(recording, name, layer, step)
        head = min(max(int(head or 0), 0), place.mass.shape[0] - 1)
        query = min(max(int(query or 0), 0), place.tiles.blocks - 1)
        kept, mass = (x[head].float().numpy() for x in (place.kept, place.mass))
        plan = mask_picture.sheet(place, recording.frames)
        row = np.sqrt(mass[query] / max(mass[query].max(), 1e-9))
        frames = recording.frames
        return {
            self.figures: _figures(place, head, query),
            self.kept: mask_picture.on_frames(plan, frames, kept[query], query, heat=False),
            self.mass: mask_picture.on_frames(plan, frames, row, query, heat=True),
            self.kept_map: mask_picture.tile_map(kept, query, heat=False),
            self.mass_map: mask_picture.tile_map(mass, query, heat=True),
            self.query: gr.Slider(0, max(1, place.tiles.blocks - 1), value=query),
        }

    def _keep(self, user: str, recording: Recording) -> None:
        with self._lock:
            self._kept.pop(user, None)
            self._kept[user] = recording
            while len(self._kept) > MOST_RECORDINGS:
                self._kept.popitem(last=False)

    def _of(self, request: gr.Request) -> Recording | None:
        with self._lock:
            return self._kept.get(str(request.session_hash))

    def forget(self, user: str) -> None:
        """A page was closed."""
        with self._lock:
            self._kept.pop(user, None)


def _picture(title: str, name: str) -> Any:
    with gr.Column(min_width=280):
        gr.HTML(f"<div class='fd-line'>{title}</div>")
        return gr.Image(show_label=False, format="png", interactive=False, elem_id=name,
                        buttons=["fullscreen"])


def _place(recording: Recording, name: Any, layer: Any, step: Any) -> Place:
    place = recording.places.get((layer, step, name))
    if place is None:
        # a method that gave up midway has no later places
        place = next(p for (_, _, other), p in recording.places.items() if other == name)
    return place


def _figures(place: Place, head: int, query: int) -> str:
    found = share(place, head)
    row = place.mass[head, query].double()
    held = float((row * place.kept[head, query].double()).sum() / row.sum().clamp_min(1e-9))
    facts = [("density", f"{found.density:.3f}", "of this head, pairs that are kept"),
             ("mass held", f"{found.held:.1%}", "attention on what is kept, this head"),
             ("best choice", f"{found.best:.1%}", "what the heaviest tiles would hold"),
             ("this tile", f"{held:.1%}", "mass held for the chosen queries"),
             ("tiles", f"{place.tiles.blocks}", f"of up to {place.tiles.block} tokens")]
    return live.figures(facts)
