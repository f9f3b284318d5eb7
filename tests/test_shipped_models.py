"""Every shipped model through the command line's code and the demo: names, kinds, defaults."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastdiff import models
from fastdiff.cli import job, sampling
from fastdiff.cli.errors import InputError
from fastdiff.cli.models import row
from fastdiff.cli.show import Show
from fastdiff.cli.sidecar import Settings

NAMES = sorted(models.shipped())
PROMPT = "a rocket on a yellow background"
SMALL = {"height": 64, "width": 64, "steps": 2}


@pytest.fixture(scope="module", params=NAMES)
def asked(request) -> tuple[Any, job.Job]:
    model = models.find(request.param)
    return model, job.Job([PROMPT], model=request.param, device="cpu", kind="image", given=SMALL,
                          method="stock")


@pytest.fixture(scope="module")
def pipe(asked) -> Any:
    model, wanted = asked
    return job.load(model, wanted.settings(model), Show(), safetensors=True)


def made(pipe: Any, settings: Settings, **changes: Any) -> np.ndarray:
    settings = replace(settings, prompt=PROMPT, **changes)
    return sampling.sample(pipe, settings, lambda step, of: None).frames


def test_all_three_are_here():
    assert NAMES == ["tiny-image", "tiny-unet", "tiny-video"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_says_what_it_makes(name):
    told = row(models.find(name))
    assert told["kind"] == (["video", "image"] if name == "tiny-video" else ["image"])
    assert told["guidance"] and told["steps"] and told["height"] % told["multiple"] == 0
    assert told["summary"] and "Apache-2.0" in told["license"]


def test_a_clip_is_refused_by_a_model_of_pictures():
    for name in ("tiny-image", "tiny-unet"):
        with pytest.raises(InputError, match="only images"):
            job.Job([PROMPT], model=name, kind="video").settings(models.find(name))


def test_guidance_and_what_to_keep_out_reach_the_model(asked, pipe):
    model, wanted = asked
    settings = wanted.settings(model)
    usual = made(pipe, settings)
    assert usual.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(made(pipe, settings, guidance=settings.guidance), usual)
    assert np.abs(made(pipe, settings, guidance=9.0) - usual).max() > 0
    assert np.abs(made(pipe, settings, negative="a red heart") - usual).max() > 0


def test_together_is_one_by_one(asked, pipe):
    model, wanted = asked
    settings = replace(wanted.settings(model), prompt=PROMPT)
    several = [settings, replace(settings, seed=1)]
    found = sampling.sample_together(pipe, several, lambda step, of: None)
    for one, result in zip(several, found, strict=True):
        assert isinstance(result, sampling.Result)
        np.testing.assert_allclose(result.frames, made(pipe, one, seed=one.seed), atol=1e-3)


def test_the_demo_opens_and_its_python_lines_make_the_same(asked):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")
    from fastdiff.demo import python_lines
    from fastdiff.demo.app import build
    from fastdiff.demo.house import House
    from fastdiff.demo.limits import Limits
    from fastdiff.demo.render import Renderer
    from fastdiff.demo.wish import Wish
    from fastdiff.demo.worker import Ticket

    model, _ = asked
    renderer = Renderer(model.name, "cpu", None, offload=False)
    house = House.open(renderer, Limits.of(model.defaults))
    try:
        build(house)
        wish = Wish("image", PROMPT, steps=2, height=64, width=64, negative="a frog")
        result = renderer.make(wish, Ticket("a", lambda _: None, 600))
    finally:
        house.close()
    space: dict = {}
    exec(python_lines.lines(result.settings, renderer.pipe), space)
    np.testing.assert_array_equal(np.asarray(space["frames"]), result.fast.frames)
