"""Pictures of docs/guide-demo.md: `python tests/demo/screenshots.py [image|video|masks]`."""

import io
import subprocess
import sys
from pathlib import Path

from chromium import chromium
from PIL import Image
from playwright.sync_api import Page, sync_playwright

HOME = Path(__file__).resolve().parents[2] / "docs" / "images"
WAIT = 900_000  # ms


def number(page: Page, name: str, value: int) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.keyboard.press("Tab")


def keep(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").save(HOME / f"demo-{name}.png", optimize=True)


def image(page: Page) -> None:
    page.click("#image-go")
    page.wait_for_selector("#image-live:has-text('Done in')")
    keep(page, "image")
    page.fill("#image-prompt textarea", "a penguin on a dotted green background")
    page.click("#image-go")
    page.wait_for_selector("#image-code:has-text('penguin'), #image-live:has-text('step')")
    page.wait_for_selector("#image-live:has-text('Done in')")
    page.get_by_role("tab", name="History").click()
    page.locator("#history-gallery button img").first.click()
    keep(page, "history")


def video(page: Page) -> None:
    page.get_by_role("tab", name="Video").click()
    page.click("#video-go")
    page.wait_for_selector("#video-live:has-text('step 5 of')")
    page.evaluate("window.scrollTo(0, 0)")
    keep(page, "live")
    page.wait_for_selector("#video-live:has-text('Done in')")
    page.wait_for_selector("#video-fast video")
    page.locator(".fd-play button").first.click()
    page.wait_for_timeout(900)
    page.locator(".fd-play button").first.click()
    page.evaluate("window.scrollTo(0, 0)")
    keep(page, "video")


def masks(page: Page) -> None:
    page.get_by_role("tab", name="Masks").click()
    page.set_viewport_size({"width": 1440, "height": 1080})
    page.locator("#masks-kind").get_by_label("image").check()
    page.fill("#masks-prompt textarea", "a green frog on a striped yellow background")
    page.click("#method-tile-sparse button")
    page.fill("[id='knob-tile-sparse.tile'] input, [id='knob-tile-sparse.tile'] textarea", "1,2,2")
    page.keyboard.press("Tab")
    page.click("#method-tile-sparse button >> nth=0")
    number(page, "masks-steps", 12)
    page.click("#masks-go")
    page.wait_for_selector("#masks-kept img")
    box = page.locator("#masks-kept img").bounding_box()
    assert box is not None
    page.locator("#masks-kept img").click(position={"x": 0.55 * box["width"],
                                                    "y": 0.5 * box["height"]})
    keep(page, "masks")


def main() -> None:
    server = subprocess.Popen([sys.executable, "-m", "fastdiff.cli", "demo"],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 960})
            page.set_default_timeout(WAIT)
            page.goto(address)
            page.wait_for_selector("#preset")
            takes = {"image": image, "video": video, "masks": masks}
            for name in sys.argv[1:] or takes:
                takes[name](page)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
