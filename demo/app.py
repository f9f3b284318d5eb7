"""The page: header, method panel, tabs."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from fastdiff import __version__
from fastdiff.demo.batch_tab import BatchTab
from fastdiff.demo.generate_tab import GenerateTab
from fastdiff.demo.history_tab import HistoryTab
from fastdiff.demo.house import House
from fastdiff.demo.masks_tab import MasksTab
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.render import Renderer
from fastdiff.demo.settings_bar import SettingsBar

CLEAN_EVERY, CLEAN_AFTER = 300, 3600  # seconds


def build(house: House) -> gr.Blocks:
    """The page."""
    renderer = house.renderer
    with gr.Blocks(title="FastDiff", analytics_enabled=False, fill_width=True,
                   delete_cache=(CLEAN_EVERY, CLEAN_AFTER)) as blocks:
        gr.HTML(_head(renderer))
        with gr.Sidebar(width=350, label="Method") as side:
            gr.Markdown("### Method")
            panel = MethodPanel()
        with gr.Tabs() as tabs:
            made = {}
            for kind, title in (("image", "Image"), ("video", "Video")):
                if kind in renderer.kinds:
                    with gr.Tab(title, id=kind, render_children=True):
                        made[kind] = GenerateTab(kind, house, panel)
            bar = SettingsBar(house, panel, tabs, made)
            with gr.Tab("Batch", id="batch"):
                BatchTab(house, panel)
            with gr.Tab("Masks", id="masks"):
                masks = MasksTab(house, panel)
            with gr.Tab("History", id="history") as tab:
                history = HistoryTab(house, bar, tab)
        with side:
            bar.upload()
        bar.on_load(blocks)
        # a page that is loaded again finds its results by what its browser alone knows
        visitor = gr.BrowserState("", storage_key="fastdiff-visitor")

        def came(request: gr.Request, token: Any) -> str:
            return house.shelf.welcome(str(request.session_hash), token)

        # whoever opened the history before the browser was known sees it now
        blocks.load(came, [visitor], [visitor], show_progress="hidden", api_visibility="private"
                    ).then(history.refresh, None, history.refreshed, show_progress="hidden",
                           api_visibility="private")

        def left(request: gr.Request) -> None:
            house.leave(str(request.session_hash))
            masks.forget(str(request.session_hash))

        blocks.unload(left)
    return blocks


def _head(renderer: Renderer) -> str:
    model = Path(renderer.model.name).name
    chips = "".join(f"<span class='fd-chip'>{html.escape(text)}</span>" for text in (
        f"model {model}", f"{renderer.dtype} on {renderer.device}", f"version {__version__}"))
    return ("<div class='fd-head'><h1>Fast<em>Diff</em></h1><p>Stock beside fast, same seed."
            f"</p>{chips}</div>")

