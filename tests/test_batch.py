"""`fastdiff batch`: what it accepts, what it refuses and how, what it writes."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import zoo
from batch_fake import task
from PIL import Image
from typer.testing import CliRunner

from fastdiff.batch import lines, plan, sheet
from fastdiff.batch import run as run_batch
from fastdiff.batch.grid import defaults_of, expand, grid_of
from fastdiff.batch.index import entry
from fastdiff.batch.task import Task, distinct, fingerprint
from fastdiff.cli import app
from fastdiff.cli.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "kind": ["video", "image"], "height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 2,
    "guidance": 4.0, "max_sequence_length": zoo.TEXT, "multiple": 16, "frames_rule": "4n+1",
}
SPARSE = {"dense_steps": 0, "min_tokens": 1, "tile": "1,1,2", "max_density": 1, "sink": 0}


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "wan"
    zoo.build("wan").save_pretrained(folder)
    (folder / "fastdiff.json").write_text(json.dumps(DEFAULTS))
    return str(folder)


def command(*words: str | Path, code: int = 0):
    result = CliRunner().invoke(app, ["batch", *(str(word) for word in words)])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def refused(*words: str | Path) -> str:
    found = command(*words, code=2)
    assert found.stdout == "" and found.stderr.startswith("error: "), found
    assert found.stderr.count("\n") == 1
    return found.stderr


def write(path: Path, *content: str | dict) -> Path:
    path.write_text("".join(
        f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in content))
    return path


def entries(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


# input


def test_jsonl_csv_and_text_say_the_same(tmp_path):
    """A spreadsheet writes a byte order mark and CRLF; empty cells leave the default."""
    jsonl = write(tmp_path / "a.jsonl", {"prompt": "a cat, red", "seed": 3, "steps": 4}, "",
                  '"a dog"', {"prompt": "sun", "dense-steps": 0.5, "video": False})
    table = tmp_path / "a.csv"
    table.write_bytes('\ufeffPrompt,seed,steps,Dense-Steps,video\r\n"a cat, red",3,4,,\r\n\r\n'
                      "a dog,,,,\r\nsun,,,0.5,no\r\n".encode())
    one, two = plan(jsonl), plan(table)
    assert [t.id for t in one] == [t.id for t in two] and len(one) == 3
    assert [t.where.rpartition(":")[2] for t in one] == ["1", "3", "4"]
    assert [t.where.rpartition(":")[2] for t in two] == ["2", "4", "5"]
    assert one[0].settings.seed == 3 and one[0].settings.steps == 4
    assert one[2].settings.kind == "image" and one[2].settings.plan
    text = tmp_path / "a.txt"
    text.write_text("a dog\n\n  a bird \n")
    assert [t.settings.prompt for t in plan(text)] == ["a dog", "a bird"]
    assert plan(text)[0].id == one[1].id


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_any_spreadsheets_separator_is_read(tmp_path, separator, suffix):
    table = tmp_path / f"a{suffix}"
    rows = ["\ufeff", "prompt*seed*tile", '"a cat, red; and\ta dog"*3*"4,4,8"', "x*1*"]
    table.write_text("\n".join(rows).replace("*", separator))
    one, two = lines.read(table)
    assert one.fields == {"prompt": "a cat, red; and\ta dog", "seed": "3", "tile": "4,4,8"}
    assert two.fields == {"prompt": "x", "seed": "1"} and two.where == f"{table}:4"


def test_one_column_and_a_header_of_two_separators_keep_the_usual_one(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text('prompt\n"a cat, red"\n a; b\n')
    assert [one.fields["prompt"] for one in lines.read(table)] == ["a cat, red", "a; b"]
    table.write_text("prompt,seed;steps\nx,1;2\n")
    assert lines.read(table)[0].fields == {"prompt": "x", "seed;steps": "1;2"}


def test_whole_numbers_as_a_table_with_empty_cells_has_them(tmp_path):
    """pandas makes floats of whole numbers beside missing ones."""
    whole = {"prompt": "x", "seed": 1, "steps": 4, "size": "64x48", "frames": 5, "min_tokens": 7,
             "tile": "1,4,4", "dense_steps": 2}
    floats = {**whole, "seed": 1.0, "steps": 4.0, "size": [64.0, 48.0], "frames": 5.0,
              "min_tokens": 7.0, "tile": [1.0, 4.0, 4.0]}
    table = tmp_path / "a.csv"
    table.write_text(f"{','.join(whole)}\nx,1.0,4.0,64.0x48.0,5.0,7.0,\"1.0,4.0,4.0\",2\n")
    found = {plan(jobs)[0].id for jobs in (
        [whole], [floats], write(tmp_path / "a.jsonl", floats), table)}
    assert len(found) == 1
    one, two = plan([{"prompt": "x", "size": 64.0}, {"prompt": "x", "size": "64"}])
    assert one.id == two.id and one.settings.height == 64


def test_multiline_cells_keep_the_line_number(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text('prompt,seed\n"a cat\nin the sun",1\nb,x\n')
    with pytest.raises(InputError, match=r"a\.csv:4: seed='x'"):
        plan(table)


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "x", "sede": 1}', "unknown field 'sede': did you mean seed"),
    ('{"prompt": "x", "densty": 1}', "did you mean density"),
    ('{"prompt": "x", "seed": -1}', "seed=-1: accepted is 0 or more"),
    ('{"prompt": "x", "seed": 1.5}', "accepted is a whole number"),
    ('{"prompt": "x", "seed": 99999999999999999999}', "at most"),
    ('{"prompt": "x", "guidance": NaN}', "guidance=NaN"),
    ('{"prompt": "x", "size": "30x30"}', "multiples of 16"),
    ('{"prompt": "x", "size": "32", "height": 32}', "either size, or height"),
    ('{"prompt": "x", "frames": 6}', "the nearest are 5 and 9"),
    ('{"prompt": "x", "kind": "gif"}', "accepted is video or image"),
    ('{"prompt": "x", "kind": "video", "video": false}', "contradicts"),
    ('{"prompt": "x", "method": "tile-spars"}', "did you mean tile-sparse"),
    ('{"prompt": "x", "density": 2}', "density=2"),
    ('{"prompt": "x", "method": "stock", "density": 0.2}', "needs a method other than stock"),
    ('{"prompt": "x", "model": "no-such"}', "unknown model 'no-such'"),
    ('{"prompt": "x", "plan": "none.json"}', "does not exist"),
    ('{"prompt": "x", "image": "none.png"}', "none.png' does not exist"),
    ('{"prompt": "x", "device": "cpu"}', "--device"),
    ('{"prompt": "x", "compare": true}', "--grid method=stock,balanced"),
    ('{"prompt": "x", "dtype": "int8"}', "unknown --dtype"),
    ('{"prompt": ["x"]}', "prompt is text"),
    ('{"prompt": "x", "seed": {"a": 1}}', "is not a value"),
    ('{"prompt": "cut \\ud83d"}', "prompt 'cut \\ud83d' is not text: character 5 is half of one"),
    ('{"prompt": "x", "negative": "\\u0000"}', "holds a zero byte"),
    ('{"prompt": "x", "select_by": "\\ud83d"}', "is half of one"),
    ('{"prompt": ""}', "there is no prompt"),
    ('{"seed": 1}', "there is no prompt"),
    ('{"prompt": "x", "Prompt": "y"}', "prompt is given twice"),
    ('{"prompt": "x"', "not JSON"),
    ("[1, 2]", "accepted is an object"),
])
def test_errors_name_file_and_line_before_anything_runs(tmp_path, wan, line, words):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": "fine"}, line)
    found = refused(jobs, "-o", tmp_path / "out", "-m", wan) if "model" not in line else refused(
        jobs, "-o", tmp_path / "out")
    assert "jobs.jsonl:2: " in found and words in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b"", "holds no job"),
    ("a.csv", b"prompt,prompt\nx,y\n", "a.csv:1: prompt is given twice"),
    ("a.csv", b"prompt,seed\nx,1,2\n", "a.csv:2: 3 cells, but the header has 2"),
    ("a.csv", b'prompt\n"x\n', "a.csv:2: "),
    ("a.txt", b"caf\xe9\n", "not UTF-8"),
    ("a.json", b"[]", "give a .jsonl file"),
])
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refused(tmp_path / name, "-o", tmp_path / "out")


@pytest.mark.parametrize("words, told", [
    (["none.jsonl", "-o", "out"], "does not exist"),
    (["-o", "out"], "nothing to make"),
    (["--set", "prompt=x"], "--output"),
    (["-o", "out", "--set", "prompt"], "is not name=value"),
    (["-o", "out", "--set", "prompt=x", "--grid", "seed=1,,2"], "without empty values"),
    (["-o", "out", "--set", "prompt=x", "--grid", "seed=1,1"], "a value twice"),
    (["-o", "out", "--set", "prompt=x", "--grid", "seed=1", "--grid", "seed=2"], "seed twice"),
    (["-o", "out", "--set", "prompt=x", "--set", "seed=1", "--grid", "seed=1"], "leave one out"),
    (["-o", "out", "--set", "prompt=x", "--batch-size", "many"], "auto, or 1 or more"),
    (["-o", "out", "--set", "prompt=x", "--images", "none*.png"], "no file matches"),
    (["-o", "out", "--set", "prompt=x", "--gpus", "2", "--processes", "2"], "--gpus goes with"),
])
def test_options_that_cannot_be(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(*words)


def test_a_grid_multiplies():
    grid = grid_of(["seed=1,2,3", "density=0.2,0.3"])
    found = expand(lines.given(["a", {"prompt": "b", "steps": 3}]), grid, {"fps": 8})
    assert len(found) == 12
    assert found[0].fields == {"fps": 8, "prompt": "a", "seed": "1", "density": "0.2"}
    assert found[-1].fields["steps"] == 3 and found[-1].fields["density"] == "0.3"
    assert grid_of(['prompt=["a, b", "c"]']) == {"prompt": ["a, b", "c"]}
    with pytest.raises(InputError, match="at most"):
        expand(lines.given(["a"]), {"seed": range(2000), "steps": range(2000)}, {})


def test_stock_in_a_grid_has_no_options():
    """Six combinations, but stock at two densities is one job."""
    tasks = plan(["a"], grid=grid_of(["method=stock,balanced,turbo", "density=0.2,0.4"]))
    assert [t.settings.plan is None for t in tasks].count(True) == 2 and len(tasks) == 6
    assert len(distinct(tasks)) == 5


def test_paths_start_from_the_file_and_on_the_command_line_from_here(tmp_path, wan, monkeypatch):
    (tmp_path / "there").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "there" / "a.png")
    assert lines.read(write(tmp_path / "there/x.jsonl", {"prompt": "x"}))[0].home.name == "there"
    monkeypatch.chdir(tmp_path / "there")
    assert defaults_of(["image=a.png"]) == {"image": str(tmp_path / "there" / "a.png")}
    assert defaults_of(["prompt=a.png"]) == {"prompt": "a.png"}


# names


def test_a_name_is_the_content(wan, tmp_path):
    same = plan([{"prompt": "a", "model": wan}, {"prompt": "a", "model": wan, "seed": 0},
                 {"prompt": "a", "model": wan, "steps": 2}])
    assert len(same) == 3 and len(distinct(same)) == 1
    changes = [{"seed": 1}, {"steps": 3}, {"prompt": "b"}, {"density": 0.3}, {"guidance": 2},
               {"negative": "x"}, {"fps": 9}, {"method": "stock"}, {"size": "32"}]
    others = plan([{"prompt": "a", "model": wan, **change} for change in changes])
    assert len({t.id for t in [*same, *others]}) == 1 + len(changes)
    assert re.fullmatch(r"a-seed0-[0-9a-f]{12}", same[0].stem)
    back = Task.from_dict(json.loads(json.dumps(same[0].to_dict())))
    assert back == same[0]


def test_new_weights_are_a_new_job(wan, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(wan, folder)
    before = fingerprint(str(folder))
    fingerprint.cache_clear()
    assert fingerprint(str(folder)) == before == fingerprint(wan)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    for i in range(len(content) // 2, len(content), 64):
        content[i] ^= 1
    weights.write_bytes(content)
    fingerprint.cache_clear()
    assert fingerprint(str(folder)) != before
    fingerprint.cache_clear()


# results


def test_a_batch_equals_single_runs(wan, tmp_path):
    """Per-job generators: what is made together is what is made alone, but for rounding."""
    jobs = [{"prompt": prompt, "seed": seed, "kind": "image", "model": wan, **SPARSE}
            for seed, prompt in enumerate(["a red cat", "b", "a long prompt of some words"])]
    alone = run_batch(jobs, tmp_path / "alone", batch_size=1)
    together = run_batch(jobs, tmp_path / "together", batch_size=3)
    assert alone.ok and together.ok
    for one, three in zip(alone.results, together.results, strict=True):
        assert one and three and one.name == three.name
        near = np.abs(iio.imread(one).astype(int) - iio.imread(three).astype(int))
        assert near.max() <= 1, near.max()
        record = json.loads(Path(f"{three}.json").read_text())
        assert record["batch"]["size"] == 3 and record["report"]["sparse_calls"] > 0
    first, second, _ = (iio.imread(path) for path in alone.results if path)
    assert (first != second).any()


def test_one_at_a_time_equals_generate_byte_for_byte(wan, tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": "a cat", "seed": 4, "video": False})
    command(jobs, "-o", tmp_path / "out", "-m", wan, "--batch-size", "1", "--quiet")
    path = tmp_path / "out" / entries(tmp_path / "out")[0]["file"]
    result = CliRunner().invoke(app, ["generate", "a cat", "--seed", "4", "--image", "-m", wan,
                                      "-o", str(tmp_path / "one.png")])
    assert result.exit_code == 0 and path.read_bytes() == (tmp_path / "one.png").read_bytes()
    again = tmp_path / "again.png"
    result = CliRunner().invoke(app, ["generate", "--from", f"{path}.json", "-o", str(again)])
    assert result.exit_code == 0 and again.read_bytes() == path.read_bytes()


def test_clips_index_sheet_and_a_second_run(wan, tmp_path):
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": "a <b>&\"cat\"</b>", "seed": 4},
                 {"prompt": "dog", "method": "stock", "video": False})
    out = tmp_path / "out"
    first = command(jobs, "-o", out, "-m", wan, "--grid", "guidance=2,3")
    assert "[4/4]" in first.stdout and "left)" in first.stdout and "index.html" in first.stdout
    found = entries(out)
    assert len(found) == 4 and {e["status"] for e in found} == {"done"}
    clips = [e for e in found if e["kind"] == "video"]
    assert len(clips) == 2 and iio.imread(out / clips[0]["file"]).shape == (5, 32, 48, 3)
    page = (out / "index.html").read_text()
    assert page.count("<article") == 4 and page.count("<video") == 2 and page.count("<img") == 2
    assert "a &lt;b&gt;" in page and "<b>" not in page and "://" not in page
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    second = command(jobs, "-o", out, "-m", wan, "--grid", "guidance=2,3,4", "--json")
    events = [json.loads(line) for line in second.stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "done", "done", "end"]
    assert events[0]["settled"] == 4 and events[-1]["made"] == 2 and events[-1]["ok"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    quiet = command(jobs, "-o", out, "-m", wan, "--grid", "guidance=5", "--quiet")
    assert all(Path(name).is_file() for name in quiet.stdout.split()) and not quiet.stderr
    assert len(quiet.stdout.split()) == 2
    dry = command(jobs, "-o", out, "-m", wan, "--grid", "guidance=5,6", "--dry-run")
    assert "4 jobs, 2 settled, 2 to make in 2 groups" in dry.stdout


def test_some_failed_is_code_1_and_the_rest_is_made(wan, tmp_path, monkeypatch):
    from fastdiff.cli import sampling

    real = sampling._result

    def nan(pipe, settings, found, seconds):
        return real(pipe, settings, found * (np.nan if settings.seed == 2 else 1), seconds)

    monkeypatch.setattr(sampling, "_result", nan)
    words = ["-o", tmp_path / "out", "-m", wan, "--set", "prompt=x", "--set", "kind=image",
             "--grid", "seed=1,2,3", "--batch-size", "3"]
    found = command(*words, code=1)
    assert "NaN" in found.stdout and "--retry-failed" in found.stdout
    assert sorted(e["status"] for e in entries(tmp_path / "out")) == ["done", "done", "failed"]
    monkeypatch.undo()
    assert "failed before" not in command(*words, code=1).stdout
    assert command(*words, "--retry-failed").exit_code == 0


def test_what_only_the_loaded_model_knows_is_refused_before_the_first_job(wan, tmp_path):
    """A folder without fastdiff.json: the multiple of its sides is known when it is loaded."""
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(wan, bare)
    (bare / "fastdiff.json").unlink()
    jobs = write(tmp_path / "jobs.jsonl", {"prompt": "x", "size": "32"},
                 {"prompt": "y", "size": "33"})
    found = command(jobs, "-o", tmp_path / "out", "-m", bare, "--set", "frames=5", code=2)
    assert "jobs.jsonl:2: the model cannot make 33x33" in found.stderr
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_pictures_to_start_from(tmp_path):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img

    parts = zoo.build("sd15").components
    img2img.StableDiffusionImg2ImgPipeline(**parts).save_pretrained(tmp_path / "model")
    for i, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    words = ["-o", tmp_path / "out", "-m", tmp_path / "model", "--set", "prompt=x", "--set",
             "steps=2"]
    assert "is no picture" in refused(*words, "--images", tmp_path / "*.png")
    found = refused("-o", tmp_path / "out", "--set", "prompt=x", "--images", tmp_path / "0.png")
    assert "takes no image" in found and "WanPipeline" in found
    command(*words, "--images", tmp_path / "[01].png")
    found = entries(tmp_path / "out")
    assert len(found) == 2 and {e["kind"] for e in found} == {"image"}
    made = [iio.imread(tmp_path / "out" / e["file"]) for e in found]
    assert made[0].shape == (24, 24, 3) and (made[0] != made[1]).any()
    # the content of the picture counts, not its name
    (tmp_path / "0.png").rename(tmp_path / "3.png")
    assert command(*words, "--images", tmp_path / "[13].png").stdout.startswith(
        "2 jobs, 2 settled")


def test_the_sheet_shows_failures_and_awkward_words():
    one = task(1, prompt="</script><script>alert(1)</script>")
    note = {"id": one.id, "stem": one.stem, "where": "x:1", "error": "<oops>", "deaths": 0,
            "when": "now", "settings": one.settings.to_dict()}
    page = sheet.page([entry(note)], "a & b")
    assert "<script>alert" not in page and "&lt;oops&gt;" in page and "a &amp; b" in page


def test_the_batch_part_is_light():
    program = ("import sys, fastdiff, fastdiff.batch; from fastdiff.batch import run; "
               "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


# the shipped model, several processes, signals


def _shell(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastdiff.cli", "batch", *map(str, words)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_two_processes_through_accelerate_with_the_shipped_model(tmp_path):
    """One of them is killed in the middle, and started again."""
    out = tmp_path / "out"
    words = _shell("-o", out, "--set", "prompt=a red apple", "--set", "kind=image", "--set",
                   "size=32", "--set", "steps=1", "--grid",
                   f"seed={','.join(map(str, range(24)))}", "--processes", "2", "--json")
    run = subprocess.Popen(words, env=_environment(), stdout=subprocess.PIPE, text=True)
    victim = _wait(lambda: next((badge for badge in _badges(out) if any(
        json.loads(c.read_text())["pid"] == badge for c in (out / ".fastdiff/claims").iterdir())
    ), None) if (out / ".fastdiff/claims").exists() and len(list(out.glob("*.png"))) > 2 else None)
    os.kill(victim, signal.SIGKILL)
    events = [json.loads(line) for line in run.communicate(timeout=400)[0].splitlines()]
    assert run.returncode == 0 and events[-1]["made"] == 24 and events[-1]["ok"]
    assert len(list(out.glob("*.png"))) == 24 == len(entries(out))
    for left in ("claims", "workers", "runs", "failed"):
        assert list((out / ".fastdiff" / left).iterdir()) == []


def test_ctrl_c_and_sigterm_leave_no_half_file(wan, tmp_path):
    out = tmp_path / "out"
    words = _shell("-o", out, "-m", wan, "--set", "prompt=x", "--set", "kind=image", "--set",
                   "steps=300", "--grid", "seed=1,2,3,4,5,6", "--batch-size", "1", "--quiet")
    for number in (signal.SIGINT, signal.SIGTERM):
        done = len(list(out.glob("*.png")))
        # a shell's background jobs ignore the signal, and so would their children
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        run = subprocess.Popen(words, env=_environment(), stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, preexec_fn=listen)
        _wait(lambda done=done: len(list(out.glob("*.png"))) > done or None)
        run.send_signal(number)
        error = run.communicate(timeout=300)[1]
        assert run.returncode == 130 and error == "stopped: no unfinished file is left\n"
        assert not [path for path in out.iterdir() if ".part" in path.name]
        assert list((out / ".fastdiff/claims").iterdir()) == []


def test_processes_of_a_launcher_share_a_folder_and_one_speaks(wan, tmp_path):
    """As under `accelerate launch` on one or several machines: only the environment differs."""
    out = tmp_path / "out"
    words = _shell("-o", out, "-m", wan, "--set", "prompt=x", "--set", "kind=image", "--grid",
                   f"seed={','.join(map(str, range(12)))}", "--quiet")
    runs = []
    for rank in range(2):
        runs.append(subprocess.Popen(words, env={**_environment(), "RANK": str(rank),
                                                 "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        # the one that speaks has to see the work begin: on a busy machine it came when all was made
        _wait(lambda: runs[0].poll() is not None or runs[0].pid in _badges(out) or None)
    (first, error), (second, other) = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], error + other
    assert len(first.split()) == 12 == len(entries(out)) and second == ""


def _badges(out: Path) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in (out / ".fastdiff/workers").iterdir()]


def _wait(found):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            result = found()
        except (OSError, ValueError):
            result = None
        if result is not None:
            return result
        time.sleep(0.02)
    raise AssertionError("it did not come to that")
