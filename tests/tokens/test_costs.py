"""The measured costs: once a machine, in a file, and the guard that asks them."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json

import pytest
import torch
import zoo

import fastdiff
from fastdiff.tokens import costs
from fastdiff.tokens.at_edm import AtEdm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    costs.forget()
    yield
    costs.forget()


def product():
    return lambda: torch.randn(64, 64) @ torch.randn(64, 64)


def nothing():
    return lambda: None


def clock(monkeypatch, *delays):
    """Let calls take these seconds, one after the other, and nothing else any time."""
    now = [0.0]
    left = iter(delays)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(left)

    return run


def test_measured_once_and_kept(tmp_path):
    made = []

    def ours():
        made.append(1)
        return product()

    first = costs.verdict("a product", CPU, torch.float32, product, ours)
    assert min(first) > 0 and len(made) == 1
    assert costs.verdict("a product", CPU, torch.float32, product, ours) == first
    costs.forget()
    assert costs.verdict("a product", CPU, torch.float32, product, ours) == first
    assert len(made) == 1
    folder = tmp_path / "cache"
    assert [path.name for path in folder.iterdir()] == ["costs-3.json"]
    (key, pair), = json.loads((folder / "costs-3.json").read_text()).items()
    assert key.endswith("|torch.float32|a product") and tuple(pair) == first


def test_a_busy_machine_does_not_turn_the_answer(monkeypatch):
    # two calls each to warm up, then turns of (stock, ours); four turns were disturbed
    warm = [0.1] * 4
    turns = [(0.010, 0.3), (0.7, 0.012), (0.011, 0.012), (0.2, 0.012), (0.010, 0.2), (0.5, 0.9),
             (0.2, 0.013)]
    run = clock(monkeypatch, *warm, *[seconds for turn in turns for seconds in turn])
    found = costs.measure(run, run, CPU)
    assert found == pytest.approx((0.010, 0.012)) and not found.pays


def test_long_calls_are_timed_less_often(monkeypatch):
    run = clock(monkeypatch, *[0.5] * 10)
    assert costs.measure(run, run, CPU) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("host, gpu, counts", [
    # (of stock, of ours): seconds of one call, and which of them a forward waits for
    ((1, 2), (4, 3), (4, 3)), ((4, 6), (3, 2), (4, 6)), ((1, 3), (2, 1), (2, 3))])
def test_on_a_gpu_the_slower_of_host_and_gpu_counts(monkeypatch, host, gpu, counts):
    now, free = [0.0], [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])

    def side(own, other):
        def run():
            now[0] += own * 1e-3
            # the GPU begins what is launched when it is done with the rest
            free[0] = max(now[0], free[0]) + other * 1e-3
        return run

    def wait(device):
        now[0] = max(now[0], free[0])

    monkeypatch.setattr(costs, "_wait", wait)
    stock, ours = (side(*times) for times in zip(host, gpu, strict=True))
    found = costs.measure(stock, ours, torch.device("cuda"))
    # but for the first launch or the last kernel of a row
    assert found == pytest.approx([n * 1e-3 for n in counts], rel=0.2)
    assert found.pays == (counts[1] < counts[0])


@pytest.mark.parametrize("content", ["", "[1, 2]", "{\"a\": \"b\"", "{KEY: -1}", "{KEY: [1, -1]}",
                                     "{KEY: [1]}", "{KEY: [1, \"2\"]}"])
def test_a_broken_file_is_measured_anew(tmp_path, content):
    costs.verdict("nothing", CPU, torch.float32, nothing, nothing)
    file = tmp_path / "cache" / "costs-3.json"
    key, = json.loads(file.read_text())
    file.write_text(content.replace("KEY", json.dumps(key)))
    costs.forget()
    made = []
    found = costs.verdict("nothing", CPU, torch.float32, lambda: made.append(1) or nothing(),
                          nothing)
    assert made and min(found) > 0
    assert json.loads(file.read_text())[key] == list(found)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "file"))
    assert min(costs.verdict("nothing", CPU, torch.float32, nothing, nothing)) > 0


def test_cache_folder_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs.cache_folder() == tmp_path / "fastdiff"
    monkeypatch.setattr("sys.platform", "darwin")
    assert costs.cache_folder().parts[-3:] == ("Library", "Caches", "fastdiff")


def test_a_verdict_wants_a_margin():
    assert costs.Verdict(1.0, 0.9).pays and not costs.Verdict(1.0, 0.995).pays
    assert str(costs.Verdict(0.002, 0.001)) == "1.00 ms, stock 2.00 ms"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_guard_follows_the_measurement(name, monkeypatch):
    """Both sides do run; what the clock says is given here, since other work shares it."""
    def gives(found):
        def measure(stock, ours, device):
            assert stock().shape == ours().shape
            return found

        monkeypatch.setattr(costs, "measure", measure)

    pipe = zoo.build(name)
    stock = zoo.call(name, pipe)
    fastdiff.enable(pipe, AtEdm(early_steps=0), strict=True)
    gives(costs.Verdict(0.001, 0.002))
    assert torch.equal(zoo.call(name, pipe), stock)
    told = pipe.fastdiff.report.methods["at-edm"]
    assert told["blocks whole: would not pay"] > 0 and "blocks pruned" not in told
    assert any(str(value) == "whole (2.00 ms, stock 1.00 ms)" for value in told.values())
    costs.forget()
    costs.cache_folder().joinpath("costs-3.json").unlink()
    gives(costs.Verdict(0.002, 0.001))
    assert not torch.equal(zoo.call(name, pipe), stock)
    assert pipe.fastdiff.report.methods["at-edm"]["blocks pruned"] > 0
