"""The history tab: the last results of this browser, with their settings and files."""

from typing import Any

import gradio as gr

from fastdiff.demo import live
from fastdiff.demo.house import House
from fastdiff.demo.settings_bar import SettingsBar
from fastdiff.demo.shelf import Entry
from fastdiff.demo.wish import Wish

_SHOWN = ("prompt", "negative", "kind", "model", "plan", "seed", "steps", "guidance", "height",
          "width", "frames", "fps", "dtype", "device", "seconds", "compare")


class HistoryTab:
    """The components and the events. `tab` is the tab they are in."""

    def __init__(self, house: House, bar: SettingsBar, tab: gr.Tab) -> None:
        self._house, self._bar = house, bar
        self.none = gr.HTML(live.note("Nothing yet: the last results of this browser appear here, "
                                      "the newest first."))
        self.gallery = gr.Gallery(show_label=False, columns=6, height=200,
                                  object_fit="contain", rows=1,
                                  interactive=False, visible=False, allow_preview=False,
                                  format="png", elem_id="history-gallery")
        self.key = gr.State("")
        with gr.Column(visible=False) as self.detail:
            self.line = gr.HTML()
            self.again = gr.Button("Use these settings", variant="primary", size="md",
                                   elem_id="history-again")
            with gr.Row(equal_height=False):
                self.settings = gr.JSON(label="Settings", max_height=420,
                                        elem_id="history-settings")
                self.files = gr.File(label="Files", file_count="multiple", interactive=False)
        self.refreshed = [self.gallery, self.none, self.detail]
        self._connect(tab)

    def refresh(self, request: gr.Request) -> dict[Any, Any]:
        """What `refreshed` shows now."""
        found = [(str(entry.files["fast"]), caption(entry)) for entry in self._mine(request)]
        return {self.gallery: gr.Gallery(found, visible=bool(found), selected_index=None),
                self.none: gr.HTML(visible=not found), self.detail: gr.Column(visible=False)}

    def _connect(self, tab: gr.Tab) -> None:
        tab.select(self.refresh, None, self.refreshed, show_progress="hidden",
                   api_visibility="private")

        def pick(request: gr.Request, event: gr.SelectData) -> dict[Any, Any]:
            mine = self._mine(request)
            if not isinstance(event.index, int) or not 0 <= event.index < len(mine):
                return {self.key: ""}
            entry = mine[event.index]
            shown = {name: entry.record[name] for name in _SHOWN if name in entry.record}
            cards = live.cards(entry.facts, entry.record["seconds"], entry.record["report"])
            return {self.key: entry.key, self.detail: gr.Column(visible=True), self.line: cards,
                    self.settings: shown, self.files: [str(p) for p in entry.files.values()]}

        self.gallery.select(pick, None, [self.key, self.detail, self.line, self.settings,
                            self.files], show_progress="hidden", api_visibility="private")

        def again(request: gr.Request, key: str) -> dict[Any, Any]:
            return self._bar.show(lambda: self._wish(request, key),
                                  "The settings of that result are filled in.")

        self.again.click(again, [self.key], self._bar.outputs, show_progress="hidden",
                         api_visibility="private")

    def _mine(self, request: gr.Request) -> list[Entry]:
        return self._house.shelf.of(str(request.session_hash))

    def _wish(self, request: gr.Request, key: str) -> Wish | None:
        return next((entry.wish for entry in self._mine(request) if entry.key == key), None)


def caption(entry: Entry) -> str:
    """One line about a result."""
    speed = "" if entry.facts is None else f"{entry.facts['speedup']:.2f}× "
    return f"{speed}{entry.record['method']} · {entry.wish.prompt[:32]}"
