"""What a call in stages leaves behind: errors, stops, callbacks, copies, other schedulers."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import copy
import io

import diffusers
import pytest
import torch
import zoo
from test_bottleneck import STAGES, STEPS, staged, state_of

import fastdiff
from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage


def test_an_error_in_a_call_leaves_the_pipeline_as_it_was():
    pipe = zoo.build("flux")
    stock = zoo.call("flux", pipe)
    scheduler, state, attributes = pipe.scheduler, state_of(pipe.scheduler), {*vars(pipe)}
    fastdiff.enable(pipe, staged())
    entered, hooks = {*vars(pipe)}, len(zoo.denoiser(pipe)._forward_pre_hooks)

    def fail(pipe, step, timestep, tensors):
        if step == 3:
            raise RuntimeError("stop here")
        return tensors

    with pytest.raises(RuntimeError, match="stop here"):
        zoo.call("flux", pipe, callback_on_step_end=fail)
    assert pipe.scheduler is scheduler and state_of(scheduler)[1:] == state[1:]
    # the pipeline itself notes how many steps its last call has
    assert {*vars(pipe)} - {"_num_timesteps", "_current_timestep"} == entered - {
        "_num_timesteps", "_current_timestep"}
    assert len(zoo.denoiser(pipe)._forward_pre_hooks) == hooks
    out = zoo.call("flux", pipe)
    assert out.shape == stock.shape
    pipe.disable_fastdiff()
    assert {*vars(pipe)} == attributes
    assert torch.equal(zoo.call("flux", pipe), stock)


def test_the_bar_counts_real_steps_and_shows_the_stage():
    pipe = zoo.build("sd3")
    fastdiff.enable(pipe, staged())
    out = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=out, mininterval=0)
    zoo.call("sd3", pipe)
    shown = out.getvalue()
    assert f"{STEPS}/{STEPS}" in shown
    for number, size in enumerate(("40x36", "20x16", "40x36"), 1):
        assert f"stage {number}/3, {size}" in shown


def test_callbacks_see_the_latents_of_the_stage():
    pipe = zoo.build("sdxl")
    fastdiff.enable(pipe, staged())
    sizes = []

    def look(pipe, step, timestep, tensors):
        sizes.append(tuple(tensors["latents"].shape[-2:]))
        return tensors

    zoo.call("sdxl", pipe, callback_on_step_end=look)
    # after the last step of a stage they have the size of the next
    assert sizes == [(10, 14), (10, 14), (20, 28), (20, 28), (20, 28)]


def test_a_scheduler_replaced_since_enable_is_used():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, staged())
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert zoo.call("sd15", pipe).isfinite().all()
    assert pipe.fastdiff.clock.steps == STEPS
    pipe.disable_fastdiff()
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    stock = zoo.call("sd15", pipe)
    assert not any(key.startswith("_fastdiff") for key in vars(pipe.scheduler))
    assert stock.isfinite().all()


def test_schedulers_that_came_and_went_are_left_alone():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, staged())
    used, config = [], pipe.scheduler.config
    for cls in (diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler):
        pipe.scheduler = cls.from_config(config)
        used.append((pipe.scheduler, state_of(pipe.scheduler)))
        zoo.call("sd15", pipe)
    for scheduler, state in used:
        assert state_of(scheduler) == state
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(config)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot run in stages"):
        zoo.call("sd15", pipe)
    pipe.disable_fastdiff()
    assert not any(key.startswith("_fastdiff") for s, _ in used for key in vars(s))


def test_a_scheduler_that_a_callback_sets_stays():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, staged())
    other = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def replace(pipe, step, timestep, tensors):
        if step == STEPS - 1:
            pipe.scheduler = other
        return tensors

    zoo.call("sd15", pipe, callback_on_step_end=replace)
    assert pipe.scheduler is other


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n != "pixart_sigma"])
@pytest.mark.parametrize("stages", [STAGES, (Stage(0.5, 4), Stage(1, 1, 0.8))])
def test_a_call_that_is_stopped_in_a_low_stage_has_the_asked_size(name, stages):
    """One more evaluation is made, and its clean estimate is brought to the size of the call."""
    pipe = zoo.build(name)
    stock = zoo.call(name, pipe)
    fastdiff.enable(pipe, staged(stages=stages))
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step >= 1
        return tensors

    out = zoo.call(name, pipe, callback_on_step_end=stop)
    assert out.shape == stock.shape and out.isfinite().all() and steps == [0, 1, 2]


def test_a_call_that_is_stopped_at_full_size_stops_at_once():
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, staged())
    whole, steps = zoo.call("wan", pipe), []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step >= STEPS - 2
        return tensors

    assert zoo.call("wan", pipe, callback_on_step_end=stop).shape == whole.shape
    assert steps == [0, 1, 2, 3] and STEPS == 5
    assert torch.equal(zoo.call("wan", pipe), whole), "the next call is a whole one"


def test_pictures_of_a_stopped_call_are_of_the_asked_size():
    pipe = zoo.build("flux")
    fastdiff.enable(pipe, staged())

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    size = zoo.size("flux")
    out = zoo.call("flux", pipe, callback_on_step_end=stop, output_type="np")
    assert out.shape == (1, size["height"], size["width"], 3)


def test_enabling_twice_wraps_once():
    pipe = zoo.build("flux")
    stock, cls = zoo.call("flux", pipe), type(pipe)
    before = zoo.fingerprint(pipe)
    for _ in range(2):
        fastdiff.enable(pipe, staged())
    assert type(pipe).__mro__[1] is cls
    pipe.disable_fastdiff()
    assert zoo.fingerprint(pipe) == before and torch.equal(zoo.call("flux", pipe), stock)


def test_a_copy_of_a_pipeline_goes_on_and_is_left_on_its_own():
    pipe = zoo.build("flux")
    stock = zoo.call("flux", pipe)
    fastdiff.enable(pipe, staged())
    out = zoo.call("flux", pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(zoo.call("flux", twin), out)
    fastdiff.disable(twin)
    assert torch.equal(zoo.call("flux", twin), stock) and not twin.fastdiff.enabled
    assert torch.equal(zoo.call("flux", pipe), out) and pipe.fastdiff.enabled
    fastdiff.enable(twin, BottleneckSampling(stages=[Stage(1, 2)]))
    assert torch.equal(zoo.call("flux", twin), stock)
    assert torch.equal(zoo.call("flux", pipe), out)
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call("flux", pipe), stock)


def test_other_pipelines_are_not_touched():
    one, other = zoo.build("sd3"), zoo.build("sd3")
    stock = zoo.call("sd3", other)
    before = zoo.fingerprint(other)
    fastdiff.enable(one, staged())
    assert zoo.fingerprint(other) == before and torch.equal(zoo.call("sd3", other), stock)
    assert type(one).__name__ == type(other).__name__ and isinstance(one, type(other))
    copied = copy.deepcopy(one.scheduler)
    assert copied.config == one.scheduler.config
