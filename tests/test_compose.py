"""Several methods at once: attention beside methods that enter by `attach`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import zoo

import fastdiff
from fastdiff.config import from_plan, make_methods, methods, to_plan
from fastdiff.method import REGISTRY, Method
from fastdiff.policies.tile_sparse import TileSparse

TRACES: list[str] = []


@pytest.fixture
def scaled():
    """A token method that scales the denoiser's output, and can be told to fail."""

    @dataclass(frozen=True, kw_only=True)
    class Scaled(Method):
        name: ClassVar[str] = "scaled"
        summary: ClassVar[str] = "for tests"
        kind: ClassVar[str] = "tokens"

        factor: float = 0.5
        density: float = 1.0
        fails: bool = False
        steps: list = field(default_factory=list)

        def attach(self, host):
            hooks = []

            def after(module, args, output):
                host.report.count("scaled", "calls")
                return (output[0] * self.factor,)

            for name, part in host.models.items():
                hooks.append(part.model.register_forward_hook(after))
                TRACES.append(f"{name} {part.family.name} {host.pipe is not None}")
            if self.fails:
                for hook in hooks:
                    hook.remove()
                raise ValueError("scaled cannot enter")
            if self.steps:
                host.fallback("the last step", "it is too short")
            return lambda: [hook.remove() for hook in hooks]

    TRACES.clear()
    yield Scaled
    del REGISTRY["scaled"]


@pytest.fixture
def wan():
    return zoo.build("wan")


SPARSE = {"min_tokens": 0, "dense_steps": 0, "tile": (1, 1, 2), "max_density": 1.0}


def test_attention_and_another_method(wan, scaled):
    twin = zoo.build("wan")
    stock = zoo.call("wan", twin)
    wan.enable_fastdiff("tile-sparse", scaled(), **{f"tile-sparse.{k}": v
                                                    for k, v in SPARSE.items()})
    both = zoo.call("wan", wan)
    told = wan.fastdiff.report.summary()
    assert told["sparse_calls"] > 0 and told["methods"]["scaled"]["calls"] == 4
    assert "scaled: calls 4" in repr(wan.fastdiff) and TRACES == ["transformer Wan True"]
    wan.enable_fastdiff(scaled(factor=1.0))
    alone = zoo.call("wan", wan)
    assert torch.equal(alone, stock) and not torch.equal(both, stock)
    assert wan.fastdiff.policy is None and wan.fastdiff.report.summary()["layers"] == 0
    wan.disable_fastdiff()
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)
    assert torch.equal(zoo.call("wan", wan), stock)


def test_a_method_that_fails_leaves_the_pipeline_stock(wan, scaled):
    twin = zoo.build("wan")
    with pytest.raises(ValueError, match="cannot enter"):
        wan.enable_fastdiff("tile-sparse", scaled(fails=True))
    assert not wan.fastdiff.enabled
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)


def test_what_a_method_leaves_stock_is_told(wan, scaled):
    wan.enable_fastdiff(scaled(steps=[1]))
    assert "RUNS STOCK, 1 times: the last step: it is too short" in repr(wan.fastdiff)
    with pytest.raises(RuntimeError, match="the last step would run stock"):
        wan.enable_fastdiff(scaled(steps=[1]), strict=True)
    assert wan.fastdiff.enabled and not wan.fastdiff.strict


def test_options_find_their_method(scaled):
    made = make_methods(["scaled", "tile-sparse"], {"factor": 2.0, "scaled.density": 0.5,
                                                    "tile_sparse.density": 0.3})
    assert [m.name for m in made] == ["tile-sparse", "scaled"]
    assert made[0] == fastdiff.TileSparse(density=0.3)
    assert made[1] == scaled(factor=2.0, density=0.5)
    assert from_plan(to_plan(made)) == made


@pytest.mark.parametrize(("options", "words"), [
    ({"density": 0.5}, ["several methods", "tile-sparse.density or scaled.density"]),
    ({"scaled.size": 1}, ["scaled has no option 'size'"]),
    ({"vmoba.density": 1}, ["names a method that is not on", "tile-sparse, scaled"]),
])
def test_unclear_options_are_refused(scaled, options, words):
    with pytest.raises(ValueError) as error:
        make_methods(["tile-sparse", "scaled"], options)
    assert all(word in str(error.value) for word in words)


def test_each_method_once(scaled):
    with pytest.raises(ValueError, match="each method once"):
        make_methods([scaled(), "scaled"], {})


def test_methods_are_exported():
    assert fastdiff.Method is Method
    offered = {getattr(fastdiff, name) for name in fastdiff.__all__}
    for name, cls in methods().items():
        assert cls in offered or not cls.__module__.startswith("fastdiff."), name


def test_examples_of_the_pages_run():
    """Lines that enable something, of the pages that show methods as objects, on a tiny model."""
    pages = Path(__file__).parent.parent / "docs"
    names = {name: getattr(fastdiff, name) for name in fastdiff.__all__}
    lines = [line for page in ("tokens.md", "bottleneck.md", "freeswim.md")
             for line in (pages / page).read_text(encoding="utf-8").splitlines()
             if line.startswith("pipe.enable_fastdiff(")]
    pipes = zoo.build("wan"), zoo.build("sdxl")
    for line in lines:
        exec(line, {**names, "pipe": pipes["SDXL" in line or "at-edm" in line]})
    assert len(lines) >= 9


@pytest.mark.parametrize(("knob", "value", "accepted"), [
    ("density", "0.3", "a number"), ("density", float("nan"), "a number"),
    ("tail", "false", "True or False"), ("min_tokens", "many", "a whole number or None"),
    ("dense_layers", 2.5, "a whole number"), ("dense_layers", None, "a whole number"),
    ("dense_steps", True, "a number"), ("seed", [1], "a whole number"),
    ("tile", 4, "a tuple of numbers or None"), ("select_by", None, "a word"),
    ("window", 3, "a tuple of numbers or None"),
])
def test_a_value_of_another_type_is_named(knob, value, accepted):
    said = f"{knob}={value!r} is not possible: accepted is {accepted}"
    method = "neighborhood" if knob == "window" else "tile-sparse"
    with pytest.raises(ValueError) as error:
        make_methods([method], {knob: value})
    assert str(error.value) == said


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(1), 1])
def test_numbers_of_numpy_are_numbers(value):
    assert make_methods(["tile-sparse"], {"density": value})


@pytest.mark.parametrize(("given", "words"), [
    (["tile-sparse", "bottleneck"], "each as an argument of its own"),
    (TileSparse, r"TileSparse\(\)"), (None, "such as .balanced."), (0.3, "such as .balanced."),
])
def test_what_is_no_method_is_refused(given, words):
    with pytest.raises(ValueError, match=f"is no method: pass names or methods, {words}"):
        make_methods([given], {})
