"""The server: bound to this machine, nothing sent anywhere, everything cleaned at the end."""

import hmac
import ipaddress
import logging
import os
import signal
import threading
import webbrowser
from dataclasses import dataclass, replace
from typing import Any

# read when gradio is imported: no statistics, no look for a newer version
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# newer ones keep a history that can be sent to the hub; ours stays here
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OTEL_SDK_DISABLED"] = "true"

import gradio as gr

from fastdiff.cli import values
from fastdiff.cli.errors import InputError
from fastdiff.demo import look
from fastdiff.demo.app import build
from fastdiff.demo.house import House
from fastdiff.demo.limits import Limits
from fastdiff.demo.render import Renderer

UPLOAD = "1mb"


@dataclass(frozen=True)
class Place:
    """Where to listen and who may come in. port: None takes the next free one from 7860."""

    host: str = "127.0.0.1"
    port: int | None = None
    password: str | None = None

    @property
    def open_to_others(self) -> bool:
        """Whether other machines can reach it."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def auth(self) -> Any:
        """For gradio: any name with the password; None is open."""
        password = self.password
        if not password:
            return None
        return lambda name, given: hmac.compare_digest(given.encode(), password.encode())


def serve(house: House, place: Place) -> tuple[gr.Blocks, str]:
    """Start the server in threads of its own; the page and its address."""
    # gradio asks its own server whether it is up: not through a proxy
    near = [os.environ.get("NO_PROXY"), place.host, "127.0.0.1", "localhost"]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, near))
    # gradio's copies of results: inside the private folder that goes when the server goes
    cache = house.shelf.folder / "cache"
    cache.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    blocks = build(house)
    blocks.queue(max_size=4 * house.limits.queue, default_concurrency_limit=8, api_open=False)
    try:
        _, address, _ = blocks.launch(
            server_name=place.host, server_port=place.port, auth=place.auth(), share=False,
            prevent_thread_lock=True, quiet=True, show_error=False, inbrowser=False,
            footer_links=[], enable_monitoring=False, mcp_server=False,
            ssr_mode=False, pwa=False, max_file_size=UPLOAD, allowed_paths=[], theme=look.theme(),
            css=look.CSS, head=look.HEAD, state_session_capacity=1000,
            # skips gradio's look at its own page, which a busy machine fails within its 3 seconds
            _frontend=False,
        )
    except OSError as error:
        raise InputError(f"cannot listen on {place.host}, port {place.port or '7860 to 7959'}: "
                         f"{error}") from None
    return blocks, address


def run(
    model: str, device: str | None, dtype: str | None, offload: bool, browser: bool, place: Place,
    bounds: dict[str, Any],
) -> None:
    """Load, serve, and clean up on Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    renderer = Renderer(model, device, None if dtype is None else values.dtype(dtype), offload)
    house = House.open(renderer, replace(Limits.of(renderer.model.defaults), **bounds))
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        blocks, address = serve(house, place)
        print(f"FastDiff demo: {address}  (Ctrl-C ends it)", flush=True)
        if place.open_to_others and not place.password:
            print("Everyone who can reach this machine can use it: --password asks for one.")
        house.worker.submit("", renderer.warm_up, house.limits.seconds)
        if browser:
            webbrowser.open(address)
        try:
            ended.wait()
        except KeyboardInterrupt:
            print("ending")
        blocks.close(verbose=False)
    finally:
        house.close()
