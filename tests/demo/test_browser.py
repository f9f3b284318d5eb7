"""The page in a real browser: what a visitor does, and that nothing is asked of another host."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

WAIT = 120_000  # ms


@pytest.fixture
def page(browser, address):
    """A page that fails the test when it asks another host for anything, or logs an error."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, accept_downloads=True)
    found = context.new_page()
    found.set_default_timeout(WAIT)
    strangers, errors = [], []
    found.on("request", lambda request: strangers.append(request.url) if not request.url.startswith(
        (address, "data:", "blob:")) else None)
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.goto(address)
    found.wait_for_selector("#preset")
    yield found
    context.close()
    assert strangers == [] and errors == []


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).first.click()


def number(page, name, value):
    page.fill(f"#{name} input[type=number]", str(value))
    page.keyboard.press("Tab")


def generate(page, kind, prompt="a red cat", steps=2):
    tab(page, kind.capitalize())
    page.fill(f"#{kind}-prompt textarea", prompt)
    number(page, f"{kind}-steps", steps)
    page.click(f"#{kind}-go")


def knob(page, name, value):
    page.fill(f"[id='knob-{name}'] input, [id='knob-{name}'] textarea", value)
    page.keyboard.press("Tab")


def done(page, kind):
    page.wait_for_selector(f"#{kind}-live:has-text('Done in')")
    return page.inner_text(f"#{kind}-cards")


def pixels(page, selector):
    """The picture that an <img> of the page shows."""
    source = page.get_attribute(f"{selector} img", "src")
    answer = page.request.get(source)
    assert answer.ok
    from io import BytesIO

    return np.asarray(Image.open(BytesIO(answer.body())))


def test_a_picture_stock_beside_fast(page, tmp_path):
    page.click("#method-tile-sparse button")
    knob(page, "tile-sparse.dense_steps", "0")
    knob(page, "tile-sparse.min_tokens", "1")
    knob(page, "tile-sparse.max_density", "1")
    knob(page, "tile-sparse.tile", "1,1,2")
    knob(page, "tile-sparse.density", "0.4")
    generate(page, "image", steps=3)
    cards = done(page, "image")
    assert "PSNR" in cards and "dB" in cards and "speed-up" in cards
    page.wait_for_selector("#image-swipe img")
    page.get_by_role("tab", name="Side by side").click()
    stock, fast = pixels(page, "#image-stock"), pixels(page, "#image-fast")
    assert stock.shape == fast.shape == (32, 48, 3) and (stock != fast).any()
    page.get_by_role("tab", name="Difference").click()
    assert pixels(page, "#image-difference").any()
    assert page.locator("#image-chart svg rect").count() > 11
    page.get_by_role("button", name="The same in Python").first.click()
    assert "TileSparse(density=0.4" in page.inner_text("#image-code").replace("\xa0", " ")
    page.get_by_role("button", name="Files and link").first.click()
    with page.expect_download() as caught:
        page.locator("#image-files a[download]").first.click()
    caught.value.save_as(tmp_path / "one.png")
    inside = json.loads(Image.open(tmp_path / "one.png").info["fastdiff"])
    assert inside["plan"]["methods"][0]["tile"] == [1, 1, 2]


def test_on_a_phone_the_page_is_not_covered(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True,
                                  has_touch=True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.wait_for_selector(".sidebar:not(.open)", state="attached")
    page.locator("#image-prompt textarea").tap(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator(".sidebar .toggle-button").tap()
    page.wait_for_selector(".sidebar.open")
    page.locator("#preset").get_by_label("turbo").check(timeout=60_000)
    context.close()


def test_a_clip_plays_both_together(page):
    generate(page, "video")
    done(page, "video")
    page.wait_for_selector("#video-fast video")
    page.click("#video-stock >> xpath=ancestor::*[contains(@class, 'fd-clips')] "
               ">> .fd-play button")
    state = ("[...document.querySelectorAll('.fd-clips video')]"
             ".map(v => [v.paused, v.currentTime, v.duration])")
    page.wait_for_function(f"{state}.every(v => !v[0] && v[1] > 0)")
    # a busy machine may drop one behind for a moment; a loop may just have begun anew in one
    page.wait_for_function(
        f"""() => {{ const all = {state}, times = all.map(v => v[1]);
            const apart = Math.max(...times) - Math.min(...times);
            return all.length === 3 && Math.min(apart, all[0][2] - apart) < 0.2 }}""")
    page.locator(".fd-play button").first.click()
    page.wait_for_function(f"{state}.every(v => v[0] && Math.abs(v[1] - {state}[0][1]) < 0.05)")


def test_stop(page, house):
    generate(page, "video", steps=5000)
    page.wait_for_selector("#video-live:has-text('step')")
    page.click("#video-stop")
    page.wait_for_selector("#video-live:has-text('Stopped')")
    assert house.worker.load == 0


def test_bad_input_is_a_sentence_and_the_next_works(page):
    generate(page, "image", prompt=" ")
    page.wait_for_selector("#image-live .fd-problem:has-text('The prompt is empty')")
    number(page, "image-height", 40)
    generate(page, "image")
    page.wait_for_selector("#image-live .fd-problem:has-text('multiples of 16')")
    number(page, "image-height", 32)
    page.click("#image-go")
    done(page, "image")


def test_a_method_chosen_by_hand_is_no_preset(page):
    attention, preset = page.locator("#pick-attention"), page.locator("#preset")
    assert preset.get_by_label("balanced").is_checked()
    attention.get_by_label("vmoba").check()
    page.wait_for_selector("#method-vmoba", state="visible")
    page.wait_for_function("() => !document.querySelector('#preset input:checked')")
    attention.get_by_label("none").check()
    page.wait_for_function("() => document.querySelector('#preset input:checked')")
    assert preset.get_by_label("stock").is_checked()
    preset.get_by_label("turbo").check()
    page.wait_for_function("() => document.querySelector('#pick-attention input:checked').value "
                           "=== 'tile-sparse'")


@pytest.mark.parametrize("name, change", [("density", "fill"), ("tail", "click")])
def test_a_preset_with_another_option_is_no_preset(page, name, change):
    marked = "document.querySelector('#preset input:checked')"
    page.click("#method-tile-sparse button")
    field = page.locator(f"[id='knob-tile-sparse.{name}']").locator("input, textarea").first
    before = field.input_value()
    # as if pasted: no key is pressed
    field.fill("0.33") if change == "fill" else field.click()
    page.wait_for_function(f"() => !{marked}")
    field.fill(before) if change == "fill" else field.click()
    page.wait_for_function(f"() => {marked} && {marked}.value === 'balanced'")
    field.fill("0.33") if change == "fill" else field.click()
    page.wait_for_function(f"() => !{marked}")
    page.locator("#preset").get_by_label("turbo").check()
    page.wait_for_function(f"field => {marked} && {marked}.value === 'turbo' "
                           "&& field.value !== '0.33'", arg=field.element_handle())


def test_masks_follow_the_mouse_and_the_choices(page):
    tab(page, "Masks")
    page.locator("#masks-kind").get_by_label("image").check()
    page.click("#method-tile-sparse button")
    knob(page, "tile-sparse.tile", "1,1,1")
    number(page, "masks-steps", 2)
    page.fill("#masks-prompt textarea", "a red cat")
    page.click("#masks-go")
    page.wait_for_selector("#masks-live:has-text('Recorded'), #masks-live .fd-problem")
    assert page.inner_text("#masks-live") == "Recorded."
    page.wait_for_selector("#masks-kept img")
    assert "mass held" in page.inner_text("#masks-figures")
    first = page.get_attribute("#masks-kept img", "src")
    box = page.locator("#masks-kept img").bounding_box()
    page.locator("#masks-kept img").click(position={"x": box["width"] - 20,
                                                    "y": box["height"] - 20})
    page.wait_for_function("old => document.querySelector('#masks-kept img').src !== old",
                           arg=first)
    second = page.get_attribute("#masks-kept img", "src")
    page.locator("#masks-method").get_by_label("random-blocks").check()
    page.wait_for_function("old => document.querySelector('#masks-kept img').src !== old",
                           arg=second)
    assert page.locator("#masks-live .fd-problem").count() == 0


def test_history_and_a_link_bring_settings_back(page, address):
    number(page, "image-seed", 11)
    generate(page, "image", prompt="a green cat", steps=3)
    done(page, "image")
    page.get_by_role("button", name="Files and link").first.click()
    link = page.input_value("#image-link textarea")
    number(page, "image-seed", 5)
    page.reload()
    page.wait_for_selector("#preset")
    tab(page, "History")
    page.locator("#history-gallery button img").first.click()
    page.click("#history-again")
    page.wait_for_selector("#image-live:has-text('settings of that result')")
    assert page.input_value("#image-seed input") == "11"
    page.goto(link)
    page.wait_for_selector("#image-live:has-text('settings of the link')")
    assert page.input_value("#image-prompt textarea") == "a green cat"
    assert page.input_value("#image-seed input") == "11"


def test_history_opened_before_the_browser_is_known(page, house, monkeypatch):
    generate(page, "image", prompt="a late cat", steps=3)
    done(page, "image")
    welcome, known = house.shelf.welcome, threading.Event()

    def late(*args):
        known.wait(WAIT / 1e3)
        return welcome(*args)

    monkeypatch.setattr(house.shelf, "welcome", late)
    page.reload()
    page.wait_for_selector("#preset")
    tab(page, "History")
    page.wait_for_selector("text=Nothing yet")
    known.set()
    page.locator("#history-gallery button img").first.wait_for()


def test_a_settings_file_fills_the_page(page, house, tmp_path):
    generate(page, "image", prompt="a white cat")
    done(page, "image")
    entry = next(reversed(house.shelf._entries.values()))
    kept = shutil.copy(entry.files["settings"], tmp_path / "settings.json")
    page.reload()
    page.wait_for_selector("#settings-file")
    page.set_input_files("input[data-testid='settings-file-upload-button'], #settings-file input, "
                         "input[type=file]", str(kept))
    page.wait_for_selector("#image-live:has-text('settings of the file')")
    assert page.input_value("#image-prompt textarea") == "a white cat"
    bad = tmp_path / "bad.json"
    bad.write_text("cos\nsystem\n(S'true'\ntR.")
    page.set_input_files("#settings-file input, input[type=file]", str(bad))
    page.wait_for_selector("#image-live .fd-problem:has-text('is not JSON')")


def test_two_people_at_once(browser, page, address, house):
    generate(page, "video", steps=5000)
    page.wait_for_selector("#video-live:has-text('step')")
    other_context = browser.new_context()
    other = other_context.new_page()
    other.set_default_timeout(WAIT)
    other.goto(address)
    other.wait_for_selector("#preset")
    generate(other, "image", prompt="a second cat")
    other.wait_for_selector("#image-live:has-text('Waiting: 1 job is before yours')")
    page.click("#video-stop")
    done(other, "image")
    # a page that closes takes its jobs along
    tab(other, "History")
    other.wait_for_selector("#history-gallery button img")
    assert other.locator("#history-gallery button img").count() == 1
    generate(other, "video", steps=5000)
    other.wait_for_selector("#video-live:has-text('step')")
    other_context.close()
    end = time.monotonic() + WAIT / 1000
    while house.worker.load:
        assert time.monotonic() < end
        page.wait_for_timeout(100)
