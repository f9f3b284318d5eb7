"""The running server over HTTP: results, bad input, two users, fifty at once, and what it keeps."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from fastdiff.cli.errors import InputError
from fastdiff.demo import shelf as shelf_module
from fastdiff.demo.batch_tab import BatchTab
from fastdiff.demo.method_panel import MethodPanel
from fastdiff.demo.server import Place, serve
from fastdiff.demo.wish import Wish
from fastdiff.demo.worker import STOPPED, Ticket

ROOT = Path(__file__).resolve().parents[2]
LONG = 300  # seconds; only a hang takes them
IMAGE = ("live", "cards", "one", "stock", "fast", "difference", "scale", "chart", "report", "code",
         "files", "link", "swipe")


@pytest.fixture
def client(address):
    return connect(address)


def connect(address: str, **more: Any) -> Client:
    # a machine under load answers late
    return Client(address, verbose=False, analytics_enabled=False,
                  httpx_kwargs={"timeout": LONG}, **more)


def fields(client: Client, api: str) -> list[dict[str, Any]]:
    """What the page would send: labels and defaults."""
    known: Any = client.view_api(print_info=False, return_format="dict")
    return known["named_endpoints"][api]["parameters"]


def send(client: Client, api: str, **by_label: Any) -> Any:
    """Start an event with the page's own defaults, some replaced by their label."""
    values = []
    for parameter in fields(client, api):
        label = parameter["label"].partition(",")[0].replace(" ", "_").lower()
        values.append(by_label.pop(label, parameter.get("parameter_default")))
    assert not by_label, by_label
    return client.submit(*values, api_name=api)


def image(client: Client, **by_label: Any) -> dict[str, Any]:
    """The outputs of the image tab by name, when the job is over."""
    made = send(client, "/image", **{"prompt": "a red cat", "steps": 2, **by_label})
    return dict(zip(IMAGE, made.result(timeout=LONG), strict=True))


def text(value: Any) -> str:
    return str(value.get("value", "") if isinstance(value, dict) else value)


def test_a_picture_and_everything_about_it(client):
    found = image(client)
    assert "Done in" in text(found["live"])
    for word in ("stock", "speed-up", "PSNR", "SSIM", "density"):
        assert word in text(found["cards"])
    assert Image.open(found["fast"]).size == (48, 32)
    assert "FastDiff is on: tile-sparse" in text(found["report"])
    assert "enable_fastdiff(TileSparse(" in text(found["code"])
    assert "<svg" in text(found["chart"]) and "?s=" in text(found["link"])
    names = sorted(Path(path).suffix for path in found["files"])
    assert names == [".json", ".png", ".png", ".png"]
    one = next(path for path in found["files"] if path.endswith("seed0.png"))
    assert json.loads(Image.open(one).info["fastdiff"])["prompt"] == "a red cat"


def test_a_clip(client):
    outputs = send(client, "/video", prompt="a red cat", steps=2).result(timeout=LONG)
    clips = [path for path in outputs[-2] if path.endswith(".mp4")]
    assert len(clips) == 3
    import imageio.v3 as iio

    for clip in clips:
        assert iio.imread(clip).shape == (5, 32, 48, 3)


def test_stock_alone(client):
    found = image(client, attention="none")
    assert text(found["cards"]).count("fd-card'") == 1 and "enable" not in text(found["code"])


@pytest.mark.parametrize("bad, words", [
    ({"prompt": " "}, "The prompt is empty"),
    ({"prompt": "x" * 5000}, "5000 characters"),
    ({"height": 100000}, "accepted is 8 to 96"),
    ({"height": 40}, "sides are multiples of 16"),
    ({"seed": -4}, "Seed -4 is not possible"),
    ({"tile": "1,2"}, "Tile-sparse: tile="),
    ({"density": "dense"}, "density="),
])
def test_a_bad_setting_is_a_sentence_and_the_server_lives(client, house, bad, words):
    if "tile" in bad or "density" in bad:
        # several methods have the knob: all are sent, the chosen one's is read
        values = [bad.get(p["label"], p.get("parameter_default"))
                  for p in fields(client, "/image")]
        values[0] = "a cat"
        outputs = client.submit(*values, api_name="/image").result(timeout=LONG)
        live = text(outputs[0])
    else:
        live = text(image(client, **bad)["live"])
    assert "fd-problem" in live and words in live and "Traceback" not in live
    assert house.worker.load == 0


def test_a_slider_past_its_end_is_refused_too(client):
    with pytest.raises(AppError, match="greater than maximum value 5000"):
        image(client, steps=100000)


def test_masks(client):
    outputs = send(client, "/masks", prompt="a red cat", steps=2, make="image").result(timeout=LONG)
    assert "Recorded" in text(outputs[0])
    shown = [value for value in outputs if isinstance(value, str) and value.endswith(".png")]
    assert len(shown) == 4 and min(Image.open(path).size[0] for path in shown) > 100
    assert any("mass held" in text(value) for value in outputs if isinstance(value, (str, dict)))


def test_batch(client, tmp_path):
    made = send(client, "/batch", prompts="a red cat\n\na blue dog", seeds="0, 1", steps=1,
                make="image").result(timeout=LONG)
    assert "4 made." in text(made[0])
    archive = made[2] if isinstance(made[2], str) else made[2]["value"]
    names = zipfile.ZipFile(archive).namelist()
    assert sum(name.endswith(".png") for name in names) == 4 and "index.html" in names
    assert not any(name.startswith("/") or ".." in name for name in names)


def test_a_batch_with_lines_and_seeds_twice_counts_what_is_made(client):
    made = send(client, "/batch", prompts="a red cat\na blue dog\n a red cat ", seeds="0, 1, 00",
                steps=1, make="image").result(timeout=LONG)
    assert "4 made. 5 more asked for the same as one of these: made once." in text(made[0])
    archive = made[2] if isinstance(made[2], str) else made[2]["value"]
    names = zipfile.ZipFile(archive).namelist()
    assert sum(name.endswith(".png") for name in names) == 4
    assert len(made[1]["value"] if isinstance(made[1], dict) else made[1]) == 4


def test_a_stopped_batch(client, house):
    job = send(client, "/batch", prompts="a red cat", steps=5000, make="image")
    # the worker may not have begun, and may end while it is looked at
    until(lambda: (running := house.worker._running) is not None and running.step > 1)
    client.predict(api_name="/stop_batch")
    assert "Stopped. Nothing was written." in text(job.result(timeout=LONG)[0])


@pytest.mark.parametrize("late, told", [(False, "stopped"), (True, "stopped after 9 seconds")])
def test_a_batch_that_ends_early_keeps_what_is_made(late, told, house):
    class Cut(Ticket):
        """Stopped, or out of time, while the second job runs."""

        def check(self):
            if self.phase == "2 of 3" and late:
                raise InputError(told)
            if self.phase == "2 of 3":
                self.stop()
            super().check()

    with gr.Blocks():
        tab = BatchTab(house, MethodPanel())
    wishes = tab.wishes("a red cat\na blue dog\na sun", "image", "0", 1000, None)
    made = tab.make("someone", wishes, Cut("someone", lambda ticket: None, 1e6))
    assert 1 <= len(made.files) < 3 and made.failed == []
    assert made.cut == told and f"The rest was not made: {told}" in tab._result(made)[tab.live]
    names = zipfile.ZipFile(made.archive).namelist()
    assert sum(name.endswith(".png") for name in names) == len(made.files)
    assert "index.html" in names


def test_batch_is_bounded(client):
    live = text(send(client, "/batch", prompts="a\n" * 40).result(timeout=LONG)[0])
    assert "accepted are 1 to 32" in live
    live = text(send(client, "/batch", seeds="0,../x").result(timeout=LONG)[0])
    assert "Seeds" in live and "fd-problem" in live


def test_stop_ends_the_running_job(client, house):
    job = send(client, "/video", prompt="a red cat", steps=5000)
    until(lambda: house.worker.load == 1)
    client.predict(api_name="/stop_video")
    assert "Stopped" in text(job.result(timeout=LONG)[0])
    assert house.worker.load == 0


def test_two_users_have_their_own_results_and_jobs(address, house):
    one, two = (connect(address) for _ in range(2))
    first = send(one, "/video", prompt="a red cat", steps=5000)
    until(lambda: house.worker.load == 1)
    second = send(two, "/image", prompt="a blue dog", steps=1)
    until(lambda: house.worker.load == 2)
    two.predict(api_name="/stop_video")  # ends the second's jobs, not the first's
    assert "Stopped" in text(second.result(timeout=LONG)[0])
    assert house.worker.load == 1
    one.predict(api_name="/stop_image")
    assert "Stopped" in text(first.result(timeout=LONG)[0])
    image(one, prompt="mine")
    users = {entry.user for entry in house.shelf._entries.values()}
    assert len(users) == 1 and [e.wish.prompt for e in house.shelf.of(users.pop())] == ["mine"]


def test_fifty_at_once_lose_nothing_and_keep_nothing(address, house):
    """Fifty pages ask at the same time; every one gets its own result, and memory stays."""
    clients = [connect(address) for _ in range(50)]
    image(clients[0])
    before = _rss()

    def ask(number: int) -> str:
        made = send(clients[number], "/image", prompt=f"cat number {number}", steps=1,
                    stock_beside_it=False)
        return text(dict(zip(IMAGE, made.result(timeout=LONG), strict=True))["code"])

    with ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(ask, range(50)))
    assert all(f"'cat number {number}'" in code for number, code in enumerate(codes))
    assert house.worker.load == 0
    assert len(house.shelf._entries) == house.limits.results == 20
    assert len([path for path in house.shelf.folder.iterdir() if path.name != "cache"]) == 20
    assert _rss() - before < 300 * 2**20


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def until(ready) -> None:
    end = time.monotonic() + LONG
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def fetch(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=LONG) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_no_file_of_the_machine_is_served(address, house):
    home = address.rstrip("/")
    secret = house.shelf.folder / "secret.txt"
    secret.write_text("secret")
    for path in ("/etc/passwd", str(secret), str(ROOT / "pyproject.toml")):
        code, body = fetch(f"{home}/gradio_api/file={path}")
        assert code in (403, 404) and b"root:" not in body and b"secret" not in body


def test_a_path_in_place_of_a_settings_file_is_refused(client, address):
    """The page uploads bytes; a request that names a file of the server gets nothing."""
    home = address.rstrip("/")
    config = json.loads(fetch(f"{home}/config")[1])
    upload = next(part["id"] for part in config["components"] if part["type"] == "uploadbutton")
    event = next(d for d in config["dependencies"] if d["inputs"] == [upload])
    body = {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
            "fn_index": event["id"], "session_hash": "abc"}
    request = urllib.request.Request(f"{home}/gradio_api/queue/join", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=LONG).read()
    with urllib.request.urlopen(f"{home}/gradio_api/queue/data?session_hash=abc",
                                timeout=LONG) as stream:
        told = stream.read().decode()
    assert '"success": false' in told.replace('":false', '": false') and "root:" not in told


def test_the_page_names_no_other_host(address):
    page = fetch(address)[1].decode()
    config = json.loads(fetch(f"{address.rstrip('/')}/config")[1])
    assert config["analytics_enabled"] is False
    for host in ("googleapis", "gstatic", "cdnjs", "huggingface.co/api"):
        assert host not in page.split("<body")[0] or f"<link href=\"https://{host}" not in page
    assert not [url for url in config.get("stylesheets") or [] if url.startswith("http")]


def test_a_password_keeps_others_out(house):
    place = Place(password="open sesame")
    blocks, address = serve(house, place)
    try:
        code, body = fetch(f"{address.rstrip('/')}/config")
        assert code == 401 and b"components" not in body
        with pytest.raises(Exception, match="(?i)auth|credentials|login|401"):
            connect(address, auth=("me", "wrong"))
        client = connect(address, auth=("anyone", "open sesame"))
        assert "Done in" in text(image(client)["live"])
    finally:
        blocks.close(verbose=False)


def test_others_can_reach_it_only_when_told(house, address):
    assert address.startswith("http://127.0.0.1:")
    assert not Place().open_to_others and not Place("localhost").open_to_others
    assert Place("0.0.0.0").open_to_others and Place("192.0.2.1").open_to_others


def test_what_a_visitor_made_goes_with_him(house):
    job = house.ask("a", Wish("image", "a cat", steps=1))
    assert job.over.wait(LONG)
    folder = job.result.files["fast"].parent
    running = house.ask("a", Wish("video", "a cat", steps=5000))
    assert folder.exists()
    house.leave("a")
    assert running.over.wait(LONG) and running.state == STOPPED
    assert not folder.exists() and house.shelf.of("a") == []


def test_a_browser_finds_its_results_again_and_nobody_else_does(house, monkeypatch):
    shelf = house.shelf
    token = shelf.welcome("page 1", "")
    assert len(token) > 20 and shelf.welcome("stranger", "") != token
    job = house.ask("page 1", Wish("image", "a cat", steps=1))
    assert job.over.wait(LONG)
    folder = job.result.files["fast"].parent
    house.leave("page 1")
    assert shelf.of("page 1") == [] and folder.exists()
    for guess in ("", "page 1", "x" * 22, token[:-1], None, ["x"]):
        assert shelf.welcome("stranger", guess) != token and shelf.of("stranger") == []
    assert shelf.welcome("page 2", token) == token and shelf.of("page 2") == [job.result]
    # the new page may come before the old one is known to have left
    assert shelf.welcome("page 3", token) == token
    house.leave("page 2")
    assert shelf.of("page 3") == [job.result]
    house.leave("page 3")
    now = time.time()
    monkeypatch.setattr(shelf_module.time, "time", lambda: now + shelf_module.HOLD + 1)
    assert shelf.welcome("page 4", token) != token
    assert shelf.of("page 4") == [] and not folder.exists()


def test_the_command_starts_serves_and_cleans_up(folder, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    dead = tmp_path / "fastdiff-demo-999999999-x"
    dead.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff.cli", "demo", "--model", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        line = process.stdout.readline() if process.stdout else ""
        assert line.startswith("FastDiff demo: http://127.0.0.1:"), line
        assert not dead.exists() and list(tmp_path.glob("fastdiff-demo-*"))
        assert fetch(line.split()[2])[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=LONG) == 0
    assert not list(tmp_path.glob("fastdiff-demo-*"))


def test_without_gradio_there_is_one_line(tmp_path):
    program = ("import sys; sys.modules['gradio'] = None\n"
               "from importlib.machinery import PathFinder\n"
               "stock = PathFinder.find_spec\n"
               "PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == "
               "'gradio' else stock(name, *rest))\ndel sys.modules['gradio']\n"
               "from fastdiff.cli import app\napp(['demo'])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=LONG)
    assert done.returncode == 2
    assert done.stderr.strip() == ('error: the demo needs gradio: pip install '
                                   '"diffusers-fastdiff[demo]"')
