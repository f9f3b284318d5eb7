"""Settings into the page: from a file, from a link, from the history."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from fastdiff.cli import sidecar
from fastdiff.demo import live
from fastdiff.demo.generate_tab import GenerateTab
from fastdiff.demo.house import House
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.sentences import sentence
from fastdiff.demo.wish import Wish, of_link, of_record


class SettingsBar:
    """Fills fields and panel in with a wish, and opens its tab."""

    def __init__(
        self, house: House, panel: MethodPanel, tabs: gr.Tabs, made: dict[str, GenerateTab]
    ) -> None:
        self._house, self._panel, self._tabs, self._made = house, panel, tabs, made
        self.outputs = [tabs, *panel.outputs,
                        *(part for tab in made.values() for part in [*tab.outputs, tab.live])]

    def show(self, find: Callable[[], Wish | None], told: str) -> dict[Any, Any]:
        """The updates; a sentence where the settings cannot be used."""
        first = next(iter(self._made.values()))
        try:
            wish = find()
            if wish is None:
                # gradio takes an empty dict for one value
                return {self._tabs: gr.skip()}
            wish.check(self._house.limits)
            self._house.renderer.settings(wish)
            self._panel.check(wish.plan)
            tab = self._made[wish.kind]
            fields = {**tab.show(wish), **self._panel.show(wish.plan)}
        except Exception as error:
            return {first.live: live.problem(sentence(error)[0])}
        return {self._tabs: gr.Tabs(selected=wish.kind), **fields,
                tab.live: live.note(told)}

    def upload(self) -> None:
        """A button that takes a settings file: read as JSON, at once, and nothing else."""
        button = gr.UploadButton("Settings from a file", type="binary", file_types=[".json"],
                                 size="sm", elem_id="settings-file")

        def read(data: bytes | None) -> dict[Any, Any]:
            return self.show(lambda: None if data is None else self._of_file(data),
                             "The settings of the file are filled in.")

        button.upload(read, [button], self.outputs, show_progress="hidden",
                      api_visibility="private")

    def on_load(self, blocks: gr.Blocks) -> None:
        """A link with `?s=`."""
        def read(request: gr.Request) -> dict[Any, Any]:
            text = request.query_params.get("s", "")
            return self.show(lambda: of_link(text) if text else None,
                             "The settings of the link are filled in.")

        blocks.load(read, None, self.outputs, show_progress="hidden", api_visibility="private")

    def _of_file(self, data: bytes) -> Wish:
        return of_record(sidecar.parse(data, "the file"))
