"""The page and the server: tabs put together, bound to this machine, nothing sent anywhere."""

import hmac
import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# read when gradio is imported and when blocks are made: no statistics, no version check
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from fastdiff import __version__
from fastdiff.cli.errors import InputError
from fastdiff.demo import look
from fastdiff.demo.batch_tab import BatchTab
from fastdiff.demo.generate_tab import GenerateTab
from fastdiff.demo.history_tab import HistoryTab
from fastdiff.demo.house import House
from fastdiff.demo.limits import Limits
from fastdiff.demo.masks_tab import MasksTab
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.render import Renderer
from fastdiff.demo.settings_bar import SettingsBar

CLEAN_EVERY, CLEAN_AFTER = 300, 3600  # seconds
UPLOAD = "1mb"


@dataclass(frozen=True)
class Server:
    """Where to listen and who may come in. port: None takes the next free one from 7860."""

    host: str = "127.0.0.1"
    port: int | None = None
    password: str | None = None

    def auth(self) -> Any:
        """For gradio: any name with the password; None is open."""
        password = self.password
        if not password:
            return None
        return lambda name, given: hmac.compare_digest(given.encode(), password.encode())


def build(house: House) -> gr.Blocks:
    """The page."""
    renderer = house.renderer
    with gr.Blocks(title="FastDiff", analytics_enabled=False, fill_width=True,
                   delete_cache=(CLEAN_EVERY, CLEAN_AFTER)) as blocks:
        gr.HTML(_head(renderer))
        with gr.Sidebar(width=350, label="Method"):
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
            with gr.Tab("History", id="history") as history:
                HistoryTab(house, bar, history)
        bar.on_load(blocks)

        def left(request: gr.Request) -> None:
            house.leave(str(request.session_hash))
            masks.forget(str(request.session_hash))

        blocks.unload(left)
    return blocks


def serve(house: House, server: Server, block: bool = True) -> tuple[gr.Blocks, str]:
    """Start; the page and its address. block: return only when the server has ended."""
    # gradio's copies of results: inside the private folder that goes when the server goes
    cache = house.shelf.folder / "cache"
    cache.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    blocks = build(house)
    blocks.queue(max_size=4 * house.limits.queue, default_concurrency_limit=8, api_open=False)
    try:
        _, address, _ = blocks.launch(
            server_name=server.host, server_port=server.port, auth=server.auth(), share=False,
            prevent_thread_lock=True, quiet=True, show_error=False, inbrowser=False,
            footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False,
            ssr_mode=False, pwa=False, max_file_size=UPLOAD, allowed_paths=[], theme=look.theme(),
            css=look.CSS, head=look.HEAD, state_session_capacity=1000,
        )
    except OSError as error:
        raise InputError(f"cannot listen on {server.host}, port {server.port or '7860 to 7959'}: "
                         f"{error}") from None
    return blocks, address


def _head(renderer: Renderer) -> str:
    model = Path(renderer.model.name).name
    chips = "".join(f"<span class='fd-chip'>{html.escape(text)}</span>" for text in (
        f"model {model}", f"{renderer.dtype} on {renderer.device}", f"version {__version__}"))
    return ("<div class='fd-head'><h1>Fast<em>Diff</em></h1><p>Stock beside fast, same seed."
            f"</p>{chips}</div>")


__all__ = ["House", "Limits", "Server", "build", "serve"]
