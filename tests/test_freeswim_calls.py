"""FreeSwim as users call it: stopped, refused, gone on from, beside another pipeline."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import pickle

import diffusers
import numpy as np
import pytest
import torch
import zoo
from test_compat import lora
from test_freeswim import Killed, enable, killer, run, target

import fastdiff
from fastdiff.pipelines.upscale.state import call_key
from fastdiff.upscale import as_frames


def _stopper(step, large):
    """Stops a call after this step of stage two (large) or of stage one, once."""
    smallest = []

    def stop(pipe, index, timestep, tensors):
        smallest.append(tensors["latents"].numel())
        if index == step and (tensors["latents"].numel() > smallest[0]) is large:
            pipe._interrupt = True
        return tensors

    return stop


def _forwards(pipe):
    """Latent numbers of every forward of the denoiser."""
    seen = []
    zoo.denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (args or [kwargs.get("hidden_states", kwargs.get("sample"))])[0].numel()),
        with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", ["wan", "flux", "ltx", "sdxl", "cogvideox", "hunyuan_video"])
def test_a_call_stopped_in_stage_one_has_the_target_and_no_stage_two(name, tmp_path):
    pipe = zoo.build(name)
    enable(pipe, name, folder=str(tmp_path))
    seen = _forwards(pipe)
    made = run(name, pipe, output_type="pt", callback_on_step_end=_stopper(1, large=False))
    assert tuple(made.shape[-2:]) == target(name) and made.isfinite().all()
    assert len({*seen}) == 1
    assert "stage 1" in pipe.fastdiff.report.methods["freeswim"]["stopped"]
    # half a clip is nothing to go on from
    assert not any(tmp_path.iterdir())
    whole = run(name, pipe, output_type="pt")
    enable(pipe, name)
    assert torch.equal(run(name, pipe, output_type="pt"), whole)


def test_a_call_stopped_in_stage_two_can_be_gone_on_with(tmp_path):
    pipe = zoo.build("wan")
    enable(pipe, "wan")
    wanted = run("wan", pipe)
    enable(pipe, "wan", folder=str(tmp_path))
    run("wan", pipe, callback_on_step_end=_stopper(1, large=True))
    assert any(tmp_path.iterdir())
    assert torch.equal(run("wan", pipe), wanted)
    assert "gone on" in pipe.fastdiff.report.methods["freeswim"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name, knobs, reason", [
    ("wan", {"target": (64, 224)}, "target=64x224 is smaller than the size of the call"),
    ("sdxl", {"shift": 3.0}, "shift=3 is for flow matching"),
])
def test_what_cannot_be_is_refused_before_stage_one(name, knobs, reason):
    pipe = zoo.build(name)
    seen = _forwards(pipe)
    fastdiff.enable(pipe, "freeswim", **{"target": target(name), **knobs})
    with pytest.raises(ValueError, match=reason):
        run(name, pipe)
    assert not seen


def test_another_scheduler_is_another_call(tmp_path):
    pipe = zoo.build("wan")
    enable(pipe, "wan", folder=str(tmp_path))
    with pytest.raises(Killed):
        run("wan", pipe, callback_on_step_end=killer(2))
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=7.0)
    found = run("wan", pipe)
    assert "gone on" not in pipe.fastdiff.report.methods["freeswim"]
    enable(pipe, "wan")
    assert torch.equal(run("wan", pipe), found)


def test_another_lora_is_another_call():
    pipe = zoo.build("wan")
    keys = [call_key(pipe, {}, {})]
    for seed in (0, 1):
        if seed:
            pipe.unload_lora_weights()
        pipe.load_lora_weights(lora("wan", pipe, seed), adapter_name="one")
        keys.append(call_key(pipe, {}, {}))
    pipe.set_adapters(pipe.get_active_adapters(), [0.25])
    keys.append(call_key(pipe, {}, {}))
    assert len({*keys}) == 4
    assert call_key(pipe, {}, {}) == keys[-1]


def test_the_result_has_the_report_of_its_call():
    pipe = zoo.build("wan")
    call = {"target": target("wan"), "num_inference_steps": 3, "output_type": "pt",
            "max_sequence_length": zoo.TEXT, **zoo.size("wan")}
    made = fastdiff.upscale_video(pipe, zoo.PROMPT, **call)
    assert "160x224, 2 of 3 steps" in str(made.report)
    assert not pipe.fastdiff.enabled
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again.frames, made.frames) and str(again.report) == str(made.report)
    assert isinstance(fastdiff.upscale_video(pipe, zoo.PROMPT, return_dict=False, **call), tuple)


def test_a_pipeline_that_shares_its_model_keeps_its_setting():
    one = zoo.build("flux")
    parts = {**one.components, "scheduler": type(one.scheduler).from_config(one.scheduler.config)}
    other = diffusers.FluxPipeline(**parts)
    handle = fastdiff.enable(one, "tile-sparse", "bottleneck", force=True)
    fastdiff.upscale_video(other, zoo.PROMPT, target=target("flux"), num_inference_steps=2,
                           max_sequence_length=zoo.TEXT, output_type="pt", **zoo.size("flux"))
    assert one.fastdiff.methods == handle.methods
    assert type(other).__call__ is diffusers.FluxPipeline.__call__
    zoo.call("flux", one)
    assert "bottleneck" in one.fastdiff.report.methods


@pytest.mark.parametrize("clip", [
    [], "clip.mp4", torch.zeros(0, 3, 8, 8), np.zeros(0), torch.full((5, 3, 8, 8), float("nan"))])
def test_what_is_no_clip_is_refused_in_words(clip):
    with pytest.raises(ValueError, match="accepted are"):
        as_frames(clip)


@pytest.mark.parametrize("file", ["clip.pt", "step.pt"])
def test_a_damaged_file_is_made_again(tmp_path, file):
    pipe = zoo.build("wan")
    enable(pipe, "wan")
    wanted = run("wan", pipe)
    enable(pipe, "wan", folder=str(tmp_path))
    with pytest.raises(Killed):
        run("wan", pipe, callback_on_step_end=killer(2))
    (left,) = tmp_path.glob(f"*/{file}")
    left.write_bytes(left.read_bytes()[:100])
    assert torch.equal(run("wan", pipe), wanted)
