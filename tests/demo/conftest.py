"""A tiny Wan pipeline in a folder, the demo around it, and a browser where there is one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo
from chromium import chromium
from demo_cases import DEFAULTS

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")

from fastdiff.demo.house import House
from fastdiff.demo.limits import Limits
from fastdiff.demo.render import Renderer
from fastdiff.demo.server import Place, serve


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models") / "wan"
    zoo.build("wan").save_pretrained(home)
    (home / "fastdiff.json").write_text(json.dumps(DEFAULTS))
    return home


@pytest.fixture(scope="session")
def renderer(folder: Path) -> Renderer:
    return Renderer(str(folder), "cpu", None, offload=False)


@pytest.fixture
def house(renderer: Renderer) -> Iterator[House]:
    found = House.open(renderer, Limits(side=96, frames=9, steps=5000, results=20))
    yield found
    found.close()


@pytest.fixture
def address(house: House) -> Iterator[str]:
    """A running server."""
    blocks, where = serve(house, Place())
    yield where
    blocks.close(verbose=False)


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright", reason="browser tests need playwright")
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: install Debian's `chromium`, or name one in "
                    "FASTDIFF_CHROMIUM")
    with sync_playwright() as driver:
        # a container runs as root, where Chromium's own sandbox cannot start
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
