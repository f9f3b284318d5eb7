"""How an implementation is chosen, and what is told of those that were not."""

# only the fields that the choice reads are there
# pyright: basic, reportArgumentType=false

import logging
from types import SimpleNamespace

import pytest
import torch

from fastdiff import TileSparse, attention
from fastdiff.kernels import availability
from fastdiff.kernels.availability import choose
from fastdiff.report import LayerReport, Report

GPU, CPU = torch.device("cuda"), torch.device("cpu")
KNOWN = ("hopper", "triton", "torch", "reference")


@pytest.fixture(autouse=True)
def _fresh():
    availability._warn.cache_clear()
    yield
    availability._warn.cache_clear()


def ask(impl="auto", device=GPU, **refused):
    return choose(impl, device, KNOWN, KNOWN[:3], lambda name: refused.get(name, []), "some_op")


def test_the_most_wanted_that_can_run(caplog):
    assert ask() == "hopper"
    assert ask(hopper=["too old"]) == "triton"
    assert ask("reference") == "reference"
    assert not caplog.records
    with pytest.raises(ValueError, match=r"for some_op \(triton: too long, too wide\)"):
        ask("triton", triton=["too long", "too wide"])
    with pytest.raises(ValueError, match="hopper: old; triton: new; torch: odd"):
        ask(hopper=["old"], triton=["new"], torch=["odd"])
    with pytest.raises(ValueError, match="'auto' or one of .* got 'cuda'"):
        ask("cuda")


def test_torch_operations_on_a_gpu_are_told_once(caplog):
    with caplog.at_level(logging.WARNING, "fastdiff"):
        for _ in range(2):
            assert ask(hopper=["too old"], triton=["not installed"]) == "torch"
        assert ask("torch") == "torch"
    assert [record.message for record in caplog.records] == [
        "torch operations run some_op, which takes longer "
        "(hopper: too old; triton: not installed)"]


def test_a_cpu_runs_torch_without_a_word(caplog):
    assert ask(device=CPU, triton=["no GPU"]) == "torch"
    assert not caplog.records


@pytest.mark.parametrize("impl, told", [("auto", True), ("triton", False)])
def test_the_report_says_why_not_the_kernel_wanted_most(monkeypatch, impl, told):
    monkeypatch.setattr(attention, "chosen_kernel", lambda *_, **__: "triton")
    monkeypatch.setattr(attention, "refused", lambda name, *_, **__: [f"{name} needs a Hopper"])
    stats = LayerReport("layer")
    session = SimpleNamespace(report=Report([stats]), impl=impl)
    call = SimpleNamespace(layer=SimpleNamespace(session=session, stats=lambda _: stats))
    q = SimpleNamespace(is_cuda=True)
    found = attention._Call._kernel(
        call, TileSparse(), q, q, q, SimpleNamespace(block=128), None, None)
    assert found == "triton"
    line = "tile-sparse: triton, not gluon, because gluon needs a Hopper"
    assert (line in str(session.report)) == told
