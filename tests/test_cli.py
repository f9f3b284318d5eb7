"""The command line: what it writes, what it refuses and how, and that help is instant."""

import dataclasses
import functools
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import zoo
from PIL import Image
from typer.testing import CliRunner

from fastdiff.cli import app, errors, output
from fastdiff.cli.methods import option_notes
from fastdiff.cli.values import pair, size, typed
from fastdiff.policies import Policy

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "kind": ["video", "image"], "height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 2,
    "guidance": 4.0, "max_sequence_length": zoo.TEXT, "multiple": 16, "frames_rule": "4n+1",
}
# options with which attention really is sparse at this size
SPARSE = ["--dense-steps", "0", "--min-tokens", "1", "--tile", "1,1,2", "--density", "0.4",
          "--option", "max_density=1", "--option", "sink=0"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "wan"
    zoo.build("wan").save_pretrained(folder)
    (folder / "fastdiff.json").write_text(json.dumps(DEFAULTS))
    return str(folder)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "sd15"
    zoo.build("sd15").save_pretrained(folder)
    return str(folder)


def run(*words: str | Path, code: int = 0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def refused(*words: str | Path) -> str:
    """The one line of an error."""
    result = run(*words, code=2)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return only_line(result.stderr)


def only_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


def python(*words: str | Path, **settings) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          env=env, timeout=120, **settings)


# help


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"]])
def test_help_answers_in_under_a_second(words):
    seconds = []
    for _ in range(3):
        begin = _seconds_of_children()
        found = python("-m", "fastdiff.cli", *words)
        seconds.append(_seconds_of_children() - begin)
        assert found.returncode == 0 and "Usage" in found.stdout
    assert 0.0 < min(seconds) < 1.0


def _seconds_of_children() -> float:
    """Of a CPU: what a busy machine does meanwhile does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_imports_nothing_heavy():
    code = ("import sys, fastdiff.cli; from typer.testing import CliRunner; "
            "assert CliRunner().invoke(fastdiff.cli.app, ['generate', '--help']).exit_code == 0; "
            "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') "
            "if m in sys.modules])")
    found = python("-c", code)
    assert found.stdout.strip() == "[]", found.stderr


# results


def test_a_clip_is_a_real_h264_file_of_the_size_asked_for(wan, tmp_path):
    path = tmp_path / "a.mp4"
    result = run("generate", "a red cat", "-m", wan, "-o", path, "--size", "48x64", "--frames", "9",
                 "--fps", "12", *SPARSE)
    assert iio.imread(path).shape == (9, 48, 64, 3)
    about = iio.immeta(path, plugin="FFMPEG")
    assert about["codec"] == "h264" and "yuv420p" in about["pix_fmt"] and about["fps"] == 12
    assert str(path) in result.stdout and "sparse calls" in result.stdout
    sidecar = json.loads((tmp_path / "a.mp4.json").read_text())
    assert (sidecar["height"], sidecar["width"], sidecar["frames"]) == (48, 64, 9)
    assert sidecar["report"]["sparse_calls"] > 0 and sidecar["report"]["density"] < 1
    plan = sidecar["plan"]["methods"][0]
    assert plan["tile"] == [1, 1, 2] and plan["sink"] == 0
    assert sidecar["versions"]["torch"] and sidecar["seconds"] > 0
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.mp4.json"]


def test_a_sidecar_makes_the_same_png_again(wan, tmp_path):
    path = tmp_path / "a.png"
    run("generate", "a red cat", "-m", wan, "-o", path, "--seed", "3", *SPARSE)
    with Image.open(path) as picture:
        assert picture.size == (48, 32)
        inside = json.loads(picture.info["fastdiff"])
    assert inside["seed"] == 3 and inside["prompt"] == "a red cat" == picture.info["prompt"]
    again, other = tmp_path / "again.png", tmp_path / "other.png"
    run("generate", "--from", f"{path}.json", "-o", again)
    assert again.read_bytes() == path.read_bytes()
    run("generate", "--from", f"{path}.json", "-o", other, "--seed", "4")
    assert (iio.imread(other) != iio.imread(path)).any()


@pytest.mark.parametrize("name, value", [
    ("steps", "many"), ("seed", None), ("height", "x"), ("plan", []), ("call", None)])
def test_a_sidecar_with_a_value_of_the_wrong_type(name, value, wan, tmp_path):
    run("generate", "a red cat", "-m", wan, "--method", "stock", "-o", tmp_path / "a.png")
    path = tmp_path / "a.png.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    told = refused("generate", "--from", path, "-o", tmp_path / "b.png")
    assert f"{name}={value!r}" in told and "wrong type" in told


def test_sparse_and_stock_differ_and_stock_of_a_sidecar_stays_stock(wan, tmp_path):
    words = ["generate", "a red cat", "-m", wan, "--image", "--json"]
    stock = json.loads(run(*words, "-o", tmp_path / "s.png", "--method", "stock").stdout)
    fast = json.loads(run(*words, "-o", tmp_path / "f.png", "--no-tail", *SPARSE).stdout)
    assert stock["results"][0]["report"] is None and stock["results"][0]["plan"] is None
    assert fast["results"][0]["plan"]["methods"][0]["tail"] is False
    assert (iio.imread(tmp_path / "s.png") != iio.imread(tmp_path / "f.png")).any()
    run("generate", "--from", tmp_path / "s.png.json", "-o", tmp_path / "t.png")
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "t.png").read_bytes()


def test_compare_writes_both_and_a_side_by_side(wan, tmp_path):
    found = run("generate", "a red cat", "-m", wan, "-o", tmp_path / "a.mp4", "--compare", "--json",
                *SPARSE)
    about = json.loads(found.stdout)["results"][0]["compare"]
    assert 5 < about["psnr"] < 100 and about["stock_seconds"] > 0
    assert iio.imread(tmp_path / "a-stock.mp4").shape == (5, 32, 48, 3)
    assert iio.imread(tmp_path / "a-compare.mp4").shape == (5, 32 + 24, 2 * 48 + 8, 3)
    run("generate", "a red cat", "-m", wan, "-o", tmp_path / "s.mp4", "--method", "stock")
    assert (iio.imread(tmp_path / "s.mp4") == iio.imread(tmp_path / "a-stock.mp4")).all()
    run("generate", "--from", tmp_path / "a.mp4.json", "-o", tmp_path / "b.mp4")
    assert (iio.imread(tmp_path / "a.mp4") == iio.imread(tmp_path / "b.mp4")).all()


def test_many_prompts_fill_a_folder_and_nothing_is_overwritten(wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "A red cat!", "a blue cat", "A red cat!", "-m", wan, "--image", "-q",
             "--steps", "1", "--method", "stock"]
    found = run(*words, "-o", "out")
    names = ["a-blue-cat-seed0.png", "a-red-cat-seed0-2.png", "a-red-cat-seed0.png"]
    assert sorted(os.listdir("out")) == sorted([*names, *(f"{name}.json" for name in names)])
    assert found.stdout.split() == [f"out/{names[2]}", f"out/{names[0]}", f"out/{names[1]}"]
    before = Path("out/a-blue-cat-seed0.png").stat()
    run(*words[:1], "a blue cat", *words[4:], "-o", "out")
    assert Path("out/a-blue-cat-seed0-2.png").exists()
    assert Path("out/a-blue-cat-seed0.png").stat() == before
    run(*words[:1], "a blue cat", *words[4:], "-o", "out", "--overwrite")
    assert Path("out/a-blue-cat-seed0.png").stat() != before
    assert not Path("out/a-blue-cat-seed0-3.png").exists()


@pytest.mark.parametrize("name, read", [("Apple.PNG", Image.open), ("Apple.Mp4", iio.imread)])
def test_a_name_is_kept_as_it_was_typed(name, read, wan, tmp_path):
    words = ["generate", "x", "-m", wan, "-o", tmp_path / name, "--method", "stock", "-q"]
    path = Path(run(*words).stdout.strip())
    assert path.name == name and read(path) is not None
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.json"]
    assert Path(run(*words).stdout.strip()).name == name.replace(".", "-2.")


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_another_run_takes_meanwhile(links, wan, tmp_path, monkeypatch):
    real, calls = output._write_png, []

    def meanwhile(part, *rest):
        if not calls:
            (tmp_path / "a.png").write_text("another run's")
        calls.append(part)
        real(part, *rest)

    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(output, "_write_png", meanwhile)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    found = run("generate", "a red cat", "-m", wan, "-o", tmp_path / "a.png", "--quiet")
    assert found.stdout.split() == [str(tmp_path / "a-2.png")]
    assert (tmp_path / "a.png").read_text() == "another run's"
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a-2.png.json", "a.png"]
    assert json.loads((tmp_path / "a-2.png.json").read_text())["file"] == "a-2.png"


def test_an_image_pipeline_with_its_own_defaults(sd15, tmp_path):
    run("generate", "a red cat", "-m", sd15, "-o", tmp_path / "a.png", "--steps", "1")
    sidecar = json.loads((tmp_path / "a.png.json").read_text())
    assert sidecar["kind"] == "image" and sidecar["guidance"] == 7.5
    assert (sidecar["height"], sidecar["width"]) == (128, 128)
    assert iio.imread(tmp_path / "a.png").shape == (128, 128, 3)
    told = refused("generate", "a red cat", "-m", sd15, "-o", tmp_path / "a.mp4")
    assert "makes pictures, not clips" in told
    assert "96x104" in refused("generate", "x", "-m", sd15, "--image", "--size", "97x101")


def test_the_shipped_model_needs_no_option(wan, tmp_path, monkeypatch):
    from fastdiff import models

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / models.FIRST).symlink_to(wan)
    monkeypatch.setattr(models, "HOME", tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    run("generate", "a red cat")
    sidecar = json.loads((tmp_path / "a-red-cat-seed0.mp4.json").read_text())
    assert sidecar["model"] == "tiny-video" and len(sidecar["model_sha256"]) == 64
    assert iio.imread("a-red-cat-seed0.mp4").shape == (5, 32, 48, 3)
    assert json.loads(run("models", "--json").stdout)[0]["name"] == "tiny-video"
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 0 and "ready: fastdiff generate" in told.stdout
    changed = {**sidecar, "model_sha256": "0" * 64}
    Path("changed.json").write_text(json.dumps(changed))
    assert "weights of the model differ" in run("generate", "--from", "changed.json").stderr


def test_a_dense_run_says_so(wan, tmp_path):
    found = run("generate", "a red cat", "-m", wan, "-o", tmp_path / "a.png", "--steps", "1")
    assert "every call ran dense" in found.stdout and "fewer than min_tokens" in found.stdout
    found = run("generate", "a red cat", "-m", wan, "-o", tmp_path / "b.png", "--report", *SPARSE)
    assert "FastDiff is on" in found.stdout and "blocks.0.attn1" in found.stdout


# refusals


@pytest.mark.parametrize(("words", "told"), [
    (["generat"], "generate"),
    (["generate"], "PROMPT"),
    (["generate", "x", "--sed", "1"], "--seed"),
    (["generate", "x", "--seed", "one"], "valid integer"),
    (["generate", "x", "--steps", "0"], "--steps"),
    (["generate", "x", "--steps", "-3"], "--steps"),
    (["generate", "x", "--seed", "9" * 20], "--seed 9999"),
    (["generate", "x", "-m", "WAN", "--guidance", "nan"], "a finite number"),
    (["generate", "\udcff apple", "-m", "WAN"], "character 1 is half of one"),
    (["generate", "x", "-m", "tiny-vdeo"], "unknown model"),
    (["generate", "x", "-m", "./nowhere"], "unknown model"),
    (["generate", "x", "-m", "WAN", "--method", "balenced"], "did you mean balanced"),
    (["generate", "x", "-m", "WAN", "--method", "tile-sprase"], "tile-sparse"),
    (["generate", "x", "-m", "WAN", "--option", "selectby=top-p"], "did you mean select_by"),
    (["generate", "x", "-m", "WAN", "--option", "density"], "name=value"),
    (["generate", "x", "-m", "WAN", "--density", "1.5"], "density=1.5"),
    (["generate", "x", "-m", "WAN", "--density", "half"], "a number"),
    (["generate", "x", "-m", "WAN", "--tile", "4,4"], "3 whole numbers"),
    (["generate", "x", "-m", "WAN", "--method", "stock", "--density", "0.2"], "other than stock"),
    (["generate", "x", "-m", "WAN", "--method", "stock", "--compare"], "other than stock"),
    (["generate", "x", "-m", "WAN", "--plan", "nowhere.json"], "does not exist"),
    (["generate", "x", "-m", "WAN", "--plan", "WAN/fastdiff.json"], "not a plan"),
    (["generate", "x", "-m", "WAN", "--size", "big"], "HEIGHTxWIDTH"),
    (["generate", "x", "-m", "WAN", "--size", "0x16"], "HEIGHTxWIDTH"),
    (["generate", "x", "-m", "WAN", "--size", "50x70"], "the nearest is 48x64"),
    (["generate", "x", "-m", "WAN", "--size", "3"], "the nearest is 16x16"),
    (["generate", "x", "-m", "WAN", "--frames", "8"], "the nearest are 5 and 9"),
    (["generate", "x", "-m", "WAN", "--frames", "8", "--image"], "--frames"),
    (["generate", "x", "-m", "WAN", "--device", "gpu"], "cpu"),
    (["generate", "x", "-m", "WAN", "--device", "cuda:99"], "cpu"),
    (["generate", "x", "-m", "WAN", "--offload", "--device", "cpu"], "it needs one"),
    (["generate", "x", "-m", "WAN", "--dtype", "float31"], "did you mean float32"),
    (["generate", "x", "-m", "WAN", "--video", "-o", "a.png"], "a.png"),
    (["generate", "x", "-m", "WAN", "-o", "a.gif"], ".mp4"),
    (["generate", "x", "-m", "WAN", "-o", "nowhere/a.mp4"], "'nowhere' does not exist"),
    (["generate", "x", "-m", "WAN", "-o", "WAN/fastdiff.json/a.png"], "is not a folder"),
    (["generate", "x", "y", "-m", "WAN", "-o", "a.mp4"], "give a folder"),
    (["generate", "x", "-m", "WAN", "-o", "/proc/a.png"], "cannot write in '/proc'"),
    (["generate", "--from", "nowhere.json"], "does not exist"),
    (["generate", "--from", "WAN/model_index.json"], "not a sidecar"),
    (["generate", "--from", "WAN"], "Is a directory"),
])
def test_bad_input_gets_one_line(words, told, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(*(word.replace("WAN", wan) for word in words))
    assert os.listdir(tmp_path) == []


def test_a_hub_id_that_cannot_be_fetched(tmp_path):
    told = refused("generate", "x", "-m", "nobody/nothing", "-o", tmp_path / "a.png")
    assert "neither a shipped name" in told and "could not be fetched" in told


def test_permission_is_checked_before_the_model_is_loaded(wan, tmp_path, monkeypatch):
    from fastdiff import models

    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(output.tempfile, "TemporaryFile", _deny)
    told = refused("generate", "x", "-m", wan, "-o", tmp_path / "a.png")
    assert "Permission denied" in told


def _deny(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: ..."),
    RuntimeError("CUDA out of memory. Tried to allocate"),
])
def test_out_of_memory_says_what_to_try(error, wan, tmp_path, monkeypatch):
    _fail_in_sampling(monkeypatch, error)
    told = refused("generate", "x", "-m", wan, "-o", tmp_path / "a.png")
    assert "--size" in told and "--dtype" in told and os.listdir(tmp_path) == []


def test_nan_is_told_and_not_written(wan, tmp_path, monkeypatch):
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    class Output:
        frames = np.full((1, 5, 32, 48, 3), np.nan)

    monkeypatch.setattr(WanPipeline, "__call__", lambda self, prompt, num_frames=5, **_: Output())
    told = refused("generate", "x", "-m", wan, "-o", tmp_path / "a.mp4")
    assert "NaN" in told and "--method stock" in told and os.listdir(tmp_path) == []


def test_strict_refuses_a_silent_dense_run(wan, tmp_path, monkeypatch):
    from fastdiff import attention

    monkeypatch.setattr(attention, "implementations", lambda *_: {"torch": ["broken today"]})
    words = ["generate", "x", "-m", wan, "-o", tmp_path / "a.png", *SPARSE]
    assert "broken today" in refused(*words, "--strict")
    assert "dense fallback" in run(*words).stdout


def _fail_in_sampling(monkeypatch, error: BaseException) -> None:
    from fastdiff.cli import sampling

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sampling, "sample", fail)


def test_an_unexpected_error_is_one_line_too_unless_asked(wan, tmp_path, monkeypatch):
    _fail_in_sampling(monkeypatch, KeyError("odd"))
    words = ["generate", "x", "-m", wan, "-o", tmp_path / "a.png"]
    found = run(*words, code=errors.UNEXPECTED)
    assert "--traceback" in only_line(found.stderr)
    shown = CliRunner().invoke(app, [*map(str, words), "--traceback"])
    assert isinstance(shown.exception, KeyError)


def test_ctrl_c_leaves_with_130_and_no_file(wan, tmp_path, monkeypatch):
    _fail_in_sampling(monkeypatch, KeyboardInterrupt())
    found = run("generate", "x", "-m", wan, "-o", tmp_path / "a.png", code=130)
    assert found.stderr.splitlines()[-1].startswith("stopped") and os.listdir(tmp_path) == []


def test_ctrl_c_that_a_library_made_another_error_of():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("cannot import") from error
    except RuntimeError as error:
        assert errors.explain(error)[1] == errors.STOPPED


def test_an_error_that_is_its_own_cause_is_told():
    error = OSError(28, "No space left on device", "out")
    error.__cause__ = error
    assert errors.explain(error) == ("No space left on device: 'out'", 2)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_real_signal(number, code, name, wan, tmp_path):
    # as the installed command does; under `python -m` CPython may end by the signal itself
    words = ["-c", "from fastdiff.cli import main; main()", "generate", "x", "-m", wan,
             "-o", str(tmp_path / name), "--steps", "900"]
    # a shell's background jobs ignore the signal, and so would their children
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, *words], stderr=theirs, preexec_fn=listen,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm",
                                    "COLUMNS": "200"})
    os.close(theirs)
    told = ""
    # the progress bar, which a terminal alone is shown
    while not re.search(r"steps.*[1-9]\d*/900", told):
        assert (more := os.read(ours, 4096)), told
        told += more.decode(errors="replace")
    process.send_signal(number)
    with suppress(OSError), open(ours, "rb", closefd=False) as rest:
        while more := rest.raw.read(4096):
            told += more.decode(errors="replace")
    os.close(ours)
    assert process.wait(120) == code and "Traceback" not in told
    assert "stopped: no unfinished file is left" in told and os.listdir(tmp_path) == []


# writing


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")

    def half(part, *_):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "_write_png", half)
    with pytest.raises(OSError, match="No space") as raised:
        output.write(path, np.zeros((1, 4, 4, 3)), 8, {})
    assert errors.explain(raised.value) == (f"No space left on device: {str(tmp_path)!r}", 2)
    assert os.listdir(tmp_path) == ["a.png"] and path.read_text() == "old"


@pytest.mark.parametrize("does, error, told", [
    ("cat | head -c 99 > $PART; echo Error: No space left on device >&2; exit 228", OSError,
     "No space left on device"),
    ("cat | head -c 99 > $PART; echo what went wrong >&2; exit 1", errors.InputError,
     "what went wrong"),
    ("head -c 99 > $PART; kill -9 $$", errors.InputError, "signal 9"),
])
def test_a_clip_that_ffmpeg_could_not_end_is_no_result(does, error, told, tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/sh\nfor PART; do :; done\n{does}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    path = tmp_path / "out" / "a.mp4"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(error, match=told):
        output.write(path, np.random.rand(9, 64, 64, 3), 8, {})
    assert os.listdir(path.parent) == ["a.mp4"] and path.read_text() == "old"


def test_sigterm_while_a_clip_is_written_leaves_no_hidden_file(tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\nfor PART; do :; done\nhead -c 99 > $PART\nkill -TERM $PPID\n"
                    "exec sleep 300\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    (tmp_path / "out").mkdir()
    before = signal.signal(signal.SIGTERM, errors.terminate)
    try:
        with pytest.raises(errors.Terminated) as raised:
            output.write(tmp_path / "out" / "a.mp4", np.random.rand(9, 64, 64, 3), 8, {})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert errors.explain(raised.value) == ("no unfinished file is left", 143)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["night: take 1.mp4", "-y.mp4", "50%d.mp4"])
def test_a_name_that_means_something_to_ffmpeg(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output.write(Path(name), np.random.rand(2, 16, 16, 3), 8, {"prompt": "x"})
    assert iio.imread(tmp_path / name).shape == (2, 16, 16, 3)


def test_odd_sides_and_long_unicode_names(tmp_path):
    output.write(tmp_path / "a.mp4", np.random.rand(3, 33, 47, 3), 8, {"prompt": "ü"})
    assert iio.imread(tmp_path / "a.mp4").shape == (3, 34, 48, 3)
    name = output.slug("Über-große Äpfel / ../../etc " * 9)
    assert len(name) <= 48 and "/" not in name and "." not in name
    assert output.slug("!!!") == "untitled"


def test_psnr():
    one = np.zeros((1, 2, 2, 3))
    assert output.psnr(one, one) == float("inf")
    assert output.psnr(one, one + 0.1) == pytest.approx(20)


# values


@pytest.mark.parametrize(("text", "hint", "value"), [
    ("3", int | float, 3), ("0.2", int | float, 0.2), ("1.0", int | float, 1.0),
    ("none", int | None, None), ("7", int | None, 7),
    ("4,4,8", tuple[int, int, int] | None, (4, 4, 8)),
    ("4x4x8", tuple[int, int, int], (4, 4, 8)), ("off", bool, False), ("Yes", bool, True),
    ("top-p", str, "top-p"), ("1e-2", float | None, 0.01), ("3.0", int | None, 3),
    ("-2.00", int, -2), ("4.0, 4.0,8", tuple[int, int, int], (4, 4, 8)), ("1.0", str, "1.0"),
])
def test_typed(text, hint, value):
    found = typed("knob", text, hint)
    assert found == value and type(found) is type(value)


def test_size_and_pair():
    assert size("256") == (256, 256) and size("256x384") == (256, 384) and size("8X16") == (8, 16)
    assert pair("min-tokens = 3") == ("min_tokens", "3")
    for bad in ("", "x", "1x2x3", "-4", "4x", "1.5"):
        with pytest.raises(errors.InputError):
            size(bad)


# the other commands


def test_methods_lists_every_option_with_its_words():
    found = json.loads(run("methods", "--json").stdout)
    assert found["default"] in found["presets"]
    options = found["methods"]["tile-sparse"]["options"]
    assert options["density"]["type"] == "float" and options["density"]["default"] == 0.25
    shared = [f.name for f in dataclasses.fields(Policy)]
    assert all(options[name]["about"] for name in shared), options
    assert "balanced" in run("methods").stdout
    notes = option_notes("Title.\n\na, b: one\n    two\nno\nc: x")
    assert notes == {"a": "one two", "b": "one two", "c": "x"}


def test_models():
    rows = json.loads(run("models", "--json").stdout)
    assert all(row["bytes"] > 0 and row["license"] for row in rows)
    assert "hub id" in run("models").stdout


def test_doctor_runs_every_part():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["works"] else 1)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["torch"] == states["ffmpeg"] == states["attention 'torch' on cpu"] == "ok"
    assert found["advice"] and result.stderr == ""
    assert "ffmpeg" in CliRunner().invoke(app, ["doctor"]).stdout
