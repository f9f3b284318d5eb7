"""FreeSwim in whole pipelines: two stages in one call, families, schedules, refusals, resuming."""

# the zoo's pipelines are of diffusers, whose attributes are not typed
# pyright: basic

import json
import logging
import math

import numpy as np
import pytest
import torch
import zoo
from PIL import Image

import fastdiff
from fastdiff.attention import DenseFallbackError
from fastdiff.config import from_plan
from fastdiff.pipelines.freeswim import FreeSwim
from fastdiff.pipelines.upscale import schedule
from fastdiff.pipelines.upscale.state import Folder
from fastdiff.policies.tile_sparse import TileSparse
from fastdiff.upscale import as_frames

FAMILIES = ("wan", "wan22", "ltx", "cogvideox", "hunyuan_video", "flux", "sdxl")
# guidance by a second forward
TWICE = ("wan", "wan22")


def target(name, times=2):
    size = zoo.size(name)
    return size["height"] * times, size["width"] * times


def enable(pipe, name, times=2, **knobs):
    fastdiff.enable(pipe, "freeswim", target=target(name, times), strict=True, **knobs)


def told(pipe):
    return pipe.fastdiff.report.methods["freeswim"]


def run(name, pipe, **changes):
    return zoo.call(name, pipe, **{"num_inference_steps": 6, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_call_gives_the_target(name):
    pipe = zoo.build(name)
    # a stock call leaves attributes of its own
    stock = run(name, pipe, output_type="pt")
    before = zoo.fingerprint(pipe)
    enable(pipe, name)
    between = zoo.fingerprint(pipe)
    out = run(name, pipe, output_type="pt")
    assert tuple(out.shape[-2:]) == target(name)
    assert out.isfinite().all()
    # nothing stays in the models between calls
    assert zoo.fingerprint(pipe) == between
    facts = told(pipe)
    assert facts["guide passes"] == facts["reuse passes"] == 2
    assert facts.get("window passes", 0) == (4 if name in TWICE else 0)
    assert "density" in facts["windows"] and facts["guide kept"].startswith("device")
    fastdiff.disable(pipe)
    assert zoo.fingerprint(pipe) == before
    assert torch.equal(run(name, pipe, output_type="pt"), stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_of_the_whole_picture_are_dense_attention(name):
    pipe = zoo.build(name)
    enable(pipe, name, times=1, mode="dense")
    wanted = run(name, pipe)
    for mode in ("window", "nocache"):
        enable(pipe, name, times=1, mode=mode, scale_mult=1.0)
        zoo.assert_near(run(name, pipe), wanted)
    # the scale tells that windows were at work
    enable(pipe, name, times=1, mode="window", scale_mult=1.3)
    assert not torch.allclose(run(name, pipe), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan_video", "sdxl"])
def test_two_prompts_are_two_runs(name):
    pipe = zoo.build(name)
    enable(pipe, name)
    prompts = ["a red cat", "a blue dog"]
    both = run(name, pipe, prompt=prompts, num_inference_steps=3)
    for i, prompt in enumerate(prompts):
        alone = run(name, pipe, seed=i, prompt=prompt, num_inference_steps=3)
        zoo.assert_near(both[i : i + 1], alone)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
def test_the_guide_changes_the_windows(name):
    pipe = zoo.build(name)
    found = {}
    for mode in ("window", "cache", "nocache", "dense"):
        enable(pipe, name, mode=mode)
        found[mode] = run(name, pipe, num_inference_steps=3)
    modes = list(found)
    for i, one in enumerate(modes):
        for other in modes[i + 1 :]:
            assert not torch.equal(found[one], found[other]), (one, other)


def test_the_same_call_gives_the_same_clip():
    pipe = zoo.build("wan")
    enable(pipe, "wan")
    assert torch.equal(run("wan", pipe), run("wan", pipe))
    assert not torch.equal(run("wan", pipe), run("wan", pipe, seed=3))


def test_the_published_schedule():
    """Shift 9, strength 0.7 of 50 steps: 35 steps from sigma 0.954."""
    pipe = zoo.build("wan")
    assert schedule.kept_steps(50, 0.7) == 35
    made = schedule.rebuilt(pipe.scheduler, 9.0)
    assert made.config.flow_shift == 9.0 and pipe.scheduler.config.flow_shift == 3.0
    schedule.write(made, {"num_inference_steps": 50}, 50, 35, 9.0)
    assert len(made.timesteps) == 35 and len(made.sigmas) == 36
    assert float(made.sigmas[0]) == pytest.approx(0.954, abs=2e-3)
    assert float(made.timesteps[0]) == pytest.approx(1000 * float(made.sigmas[0]), abs=1)
    for shift, sigma in ((3.0, 0.875), (5.0, 0.921)):
        made = schedule.rebuilt(pipe.scheduler, shift)
        schedule.write(made, {"num_inference_steps": 50}, 50, 35, shift)
        assert float(made.sigmas[0]) == pytest.approx(sigma, abs=3e-3)


@pytest.mark.parametrize(("steps", "strength", "kept"), [
    (50, 0.7, 35), (10, 0.7, 7), (30, 0.7, 21), (4, 0.1, 1), (6, 1.0, 6), (90, 0.7, 63)])
def test_steps_that_are_kept(steps, strength, kept):
    assert schedule.kept_steps(steps, strength) == kept


@pytest.mark.parametrize("name", ["wan", "flux", "ltx", "sdxl", "cogvideox"])
def test_the_clip_enters_with_the_noise_of_the_first_step(name, monkeypatch):
    """latent = signal * clip + noise * unit noise, whatever order a pipeline prepares things in."""
    from fastdiff.pipelines.upscale.refine import Refinement

    seen = {}
    mix = Refinement._mix

    def watched(self):
        ready = self._latents is not None and self.timesteps is not None
        latents, noise, level = self._latents, self._noise, self.level if ready else None
        mix(self)
        if ready:
            seen.update(latents=latents, noise=noise, level=level, clean=self.clean(latents))

    monkeypatch.setattr(Refinement, "_mix", watched)
    pipe = zoo.build(name)
    enable(pipe, name, mode="dense")
    run(name, pipe)
    signal, noise = seen["level"]
    assert seen["noise"].std() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(seen["latents"], signal * seen["clean"] + noise * seen["noise"])
    share = float(told(pipe)["stage 2"].partition("noise ")[2].partition(",")[0])
    assert share == pytest.approx(noise / (signal + noise), abs=1e-3)


def test_the_users_scheduler_is_not_written_to():
    pipe = zoo.build("wan")
    enable(pipe, "wan")
    run("wan", pipe)
    scheduler = pipe.scheduler
    # stage one ran on it, with all its steps
    assert len(scheduler.timesteps) == 6 and scheduler.config.flow_shift == 3.0


def test_a_clip_in_place_of_stage_one():
    pipe = zoo.build("wan")
    enable(pipe, "wan", mode="cache")
    whole = run("wan", pipe)
    fastdiff.disable(pipe)
    clip = zoo.call("wan", pipe, num_inference_steps=6, output_type="pt")
    size = zoo.size("wan")
    call = {"prompt": zoo.PROMPT, "num_inference_steps": 6, "output_type": "latent",
            "return_dict": False, "guidance_scale": 4.0, "max_sequence_length": zoo.TEXT, **size}
    generator = torch.Generator("cpu").manual_seed(0)
    # stage one would have drawn its noise from it
    torch.randn((1, 16, 3, size["height"] // 8, size["width"] // 8), generator=generator)
    before = zoo.fingerprint(pipe)
    out = fastdiff.upscale_video(pipe, target=target("wan"), video=clip[0], generator=generator,
                                 **call)[0]
    assert torch.equal(out, whole)
    assert zoo.fingerprint(pipe) == before and not pipe.fastdiff.enabled


def test_upscale_video_leaves_methods_as_they_were():
    pipe = zoo.build("wan")
    sparse = TileSparse(**{k: v for k, v in zoo.small_options("wan").items() if k != "strict"})
    fastdiff.enable(pipe, sparse, strict=True)
    size = zoo.size("wan")
    out = fastdiff.upscale_video(
        pipe, prompt=zoo.PROMPT, target="160x224", interval=5, num_inference_steps=3,
        output_type="latent", return_dict=False, max_sequence_length=zoo.TEXT, **size)[0]
    assert tuple(out.shape[-2:]) == (20, 28)
    assert pipe.fastdiff.methods == (sparse,)


def test_a_sparse_method_computes_the_guide():
    pipe = zoo.build("wan")
    sparse = TileSparse(density=0.3, dense_steps=0, min_tokens=150, max_density=1.0, tile=(1, 2, 4),
                        sink=0)
    fastdiff.enable(pipe, sparse, FreeSwim(target=target("wan")), strict=True)
    found = run("wan", pipe)
    layer = pipe.fastdiff.report.rows()[0]
    # stage two: one call for each guide pass; windows do not go through the method
    assert layer["sparse_calls"] == told(pipe)["guide passes"] == 2
    enable(pipe, "wan")
    assert not torch.equal(found, run("wan", pipe))


def test_clips_of_any_form():
    clip = torch.rand(5, 3, 8, 12)
    as_bytes = (clip * 255).round().byte()
    arrays = as_bytes.movedim(1, -1).numpy()
    wanted = (as_bytes.float() / 255)[None]
    assert torch.equal(as_frames(clip), clip[None])
    assert torch.equal(as_frames(clip[None]), clip[None])
    for given in (as_bytes, arrays, [*arrays], [Image.fromarray(a) for a in arrays], [*as_bytes]):
        assert torch.equal(as_frames(given), wanted)
    for wrong, word in ((torch.rand(3, 8, 12), "no clip"), (torch.rand(2, 4, 8, 8), "no clip"),
                        (clip * 2 - 1, "0 to 1"), (np.zeros((4, 8, 8), dtype="uint8"), "no clip")):
        with pytest.raises(ValueError, match=word):
            as_frames(wrong)


def test_illegal_sizes_get_the_nearest_legal_one():
    pipe = zoo.build("wan")
    with pytest.raises(ValueError, match="multiples of 16; the nearest is 1088x1920"):
        pipe.enable_fastdiff("freeswim", target=(1080, 1920))
    assert not pipe.fastdiff.enabled
    for name, wrong, near in (("flux", (30, 44), "32x44"), ("cogvideox", (90, 95), "96x96")):
        with pytest.raises(ValueError, match=f"nearest is {near}"):
            fastdiff.enable(zoo.build(name), "freeswim", target=wrong)


@pytest.mark.parametrize(("knobs", "word"), [
    ({"target": "big"}, "accepted is"), ({"target": (8,)}, "accepted is"),
    ({"target": (0, 64)}, "accepted is"), ({"mode": "fast"}, "cache or nocache"),
    ({"interval": 0}, "1 or more"), ({"strength": 0.0}, "over 0"), ({"strength": 1.5}, "at most 1"),
    ({"shift": -1.0}, "over 0"), ({"slide": "all"}, "tile or token"), ({"cache": "disk"}, "host"),
    ({"scale_mult": 0.0}, "over 0")])
def test_knobs_are_checked(knobs, word):
    with pytest.raises(ValueError, match=word):
        FreeSwim(**knobs)


def test_refused_when_enabled():
    pipe = zoo.build("wan")
    with pytest.raises(ValueError, match="needs a target"):
        fastdiff.enable(pipe, "freeswim")
    with pytest.raises(ValueError, match="bare model"):
        fastdiff.enable(pipe.transformer, "freeswim", target=(64, 64))
    with pytest.raises(ValueError, match="Accepted: WanPipeline"):
        fastdiff.enable(zoo.build("sd3"), "freeswim", target=(64, 64))
    with pytest.raises(ValueError, match="one sampling method"):
        fastdiff.enable(pipe, "freeswim", "bottleneck", target=(64, 64))


def test_refused_when_called():
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, "freeswim", target=(64, 64))
    with pytest.raises(ValueError, match="smaller than the size of the call"):
        run("wan", pipe)
    enable(pipe, "wan")
    pipe.transformer.compile()
    with pytest.raises(ValueError, match="compiled"):
        run("wan", pipe)
    pipe = zoo.build("flux")
    enable(pipe, "flux")
    with pytest.raises(ValueError, match="schedule of its own"):
        run("flux", pipe, sigmas=[1.0, 0.5])
    pipe = zoo.build("wan")
    with pytest.raises(ValueError, match="4 n \\+ 1; the nearest are 5 and 9"):
        fastdiff.upscale_video(pipe, zoo.PROMPT, target=target("wan"), video=torch.rand(6, 3, 80,
                                                                                         112),
                               max_sequence_length=zoo.TEXT, **zoo.size("wan"))
    assert not pipe.fastdiff.enabled


def test_it_refuses_to_stand_beside_token_methods():
    pipe = zoo.build("sdxl")
    fastdiff.enable(pipe, "tome", "freeswim", target=target("sdxl"))
    with pytest.raises((ValueError, DenseFallbackError), match="use one"):
        run("sdxl", pipe)


def test_settings_survive_a_plan():
    method = FreeSwim(target="1088x1920", mode="nocache", interval=5, strength=0.6, shift=7.0)
    plan = json.loads(json.dumps({"fastdiff_plan": 1, "methods": [method.to_dict()]}))
    (found,) = from_plan(plan)
    assert found == method and method.target == (1088, 1920)


class Killed(Exception):
    pass


def killer(step):
    def stop(pipe, index, timestep, tensors):
        # of stage two, whose latents are the larger ones
        if tensors["latents"].shape[-1] == 28 and index == step:
            raise Killed
        return tensors

    return stop


@pytest.mark.parametrize("name", ["wan22", "ltx", "cogvideox", "hunyuan_video", "flux", "sdxl"])
def test_other_pipelines_go_on_too(tmp_path, name):
    pipe = zoo.build(name)
    enable(pipe, name)
    sizes = []

    def note(pipe, step, timestep, tensors):
        sizes.append(tensors["latents"].numel())
        return tensors

    def stop(pipe, step, timestep, tensors):
        if tensors["latents"].numel() > sizes[0] and step == 2:
            raise Killed
        return tensors

    wanted = run(name, pipe, callback_on_step_end=note)
    enable(pipe, name, folder=str(tmp_path))
    with pytest.raises(Killed):
        run(name, pipe, callback_on_step_end=stop)
    before = len(sizes)
    assert torch.equal(run(name, pipe, callback_on_step_end=note), wanted)
    assert len(sizes) - before == 2


@pytest.mark.parametrize(("mode", "step", "done"), [
    ("cache", 0, 0), ("cache", 2, 2), ("cache", 4, 5), ("nocache", 2, 3), ("window", 0, 1)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, mode, step, done):
    pipe = zoo.build("wan")
    enable(pipe, "wan", mode=mode)
    wanted = run("wan", pipe, num_inference_steps=8)
    enable(pipe, "wan", mode=mode, folder=str(tmp_path))
    with pytest.raises(Killed):
        run("wan", pipe, num_inference_steps=8, callback_on_step_end=killer(step))
    (left,) = tmp_path.iterdir()
    assert sorted(file.name for file in left.iterdir()) == ["clip.pt", "step.pt"][: 1 + (done > 0)]
    made = []
    out = run("wan", pipe, num_inference_steps=8, callback_on_step_end=lambda p, i, t, tensors: (
        made.append(tensors["latents"].shape[-1]), tensors)[1])
    assert torch.equal(out, wanted)
    # no step of the small size is made again, and of the large one only what was not saved
    assert made == [28] * (5 - done)
    assert told(pipe).get("gone on", "after step 0 of 5") == f"after step {done} of 5"
    # a call that has returned leaves nothing behind
    assert not any(tmp_path.iterdir())


def test_a_run_killed_before_decoding_only_decodes(tmp_path, monkeypatch):
    pipe = zoo.build("wan")
    enable(pipe, "wan")
    wanted = run("wan", pipe, output_type="pt")
    enable(pipe, "wan", folder=str(tmp_path))
    decode, calls = type(pipe.vae).decode, []

    def failing(vae, latents, *args, **kwargs):
        calls.append(latents.shape[-1])
        if latents.shape[-1] == 28:
            raise Killed
        return decode(vae, latents, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", failing)
    with pytest.raises(Killed):
        run("wan", pipe, output_type="pt")
    monkeypatch.undo()
    steps = []
    out = run("wan", pipe, output_type="pt", callback_on_step_end=lambda p, i, t, tensors: (
        steps.append(i), tensors)[1])
    assert torch.equal(out, wanted) and steps == []


def test_calls_in_one_folder_do_not_mix(tmp_path):
    pipe = zoo.build("wan")
    enable(pipe, "wan", folder=str(tmp_path))
    for prompt in ("a red cat", "a blue dog"):
        with pytest.raises(Killed):
            run("wan", pipe, prompt=prompt, callback_on_step_end=killer(2))
    assert len([*tmp_path.iterdir()]) == 2
    enable(pipe, "wan")
    wanted = run("wan", pipe, prompt="a blue dog")
    enable(pipe, "wan", folder=str(tmp_path))
    assert torch.equal(run("wan", pipe, prompt="a blue dog"), wanted)
    assert len([*tmp_path.iterdir()]) == 1


def test_a_half_written_file_is_no_file(tmp_path):
    folder = Folder(str(tmp_path), "call", [])
    folder.save_clip(torch.rand(1, 2, 3, 4, 4))
    whole = folder.clip()

    class Broken(torch.Tensor):
        def __reduce_ex__(self, protocol):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        folder._write("clip.pt", {"frames": Broken()})
    again = folder.clip()
    assert again is not None and whole is not None and torch.equal(again, whole)
    assert [file.name for file in folder.path.iterdir()] == ["clip.pt"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    pipe = zoo.build("wan")
    enable(pipe, "wan", folder=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="folder="):
        run("wan", pipe)


def test_the_report_counts_what_ran():
    pipe = zoo.build("wan")
    enable(pipe, "wan", mode="nocache")
    run("wan", pipe)
    facts = told(pipe)
    assert facts["guide passes"] == 8 and "reuse passes" not in facts
    assert facts["stage 1"] == "9 frames of 80x112, made"
    assert facts["stage 2"].startswith("160x224, 4 of 6 steps, noise 0.9")
    assert not math.isnan(float(facts["windows"].partition("density ")[2]))
    assert "freeswim: stage 1" in str(pipe.fastdiff)


@pytest.mark.parametrize("slide", ["tile", "token"])
def test_the_report_says_why_windows_are_gathered(slide, caplog):
    pipe = zoo.build("wan")
    enable(pipe, "wan", slide=slide)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        run("wan", pipe)
    why = told(pipe).get("gathered because", "")
    assert why.startswith("no implementation of window_attention" if slide == "token" else "")
    assert len(caplog.records) == (slide == "token")


def test_a_schedule_that_follows_the_size_grows_with_the_side():
    """Flux: the shift of the trained size times the growth, and not the pipeline's own line."""
    pipe = zoo.build("flux")
    made = schedule.rebuilt(pipe.scheduler, None)
    config = made.config
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len)

    def mu(tokens):
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    even = {"sigmas": [1.0, 0.5], "mu": mu(4 * 1024)}
    schedule.write(made, even, 10, 7, None, grown=2.0)
    shift, begin = math.exp(mu(1024)) * 2, 0.7
    assert len(made.timesteps) == 7
    first = shift * begin / (1 + (shift - 1) * begin)
    assert float(made.sigmas[0]) == pytest.approx(first, abs=1e-5)
    schedule.write(made, even, 10, 7, 5.0, grown=2.0)
    assert float(made.sigmas[0]) == pytest.approx(5 * begin / (1 + 4 * begin), abs=1e-5)


def test_a_fixed_shift_grows_with_the_side():
    assert schedule.shift_for(zoo.build("hunyuan_video").scheduler, 1.5) == pytest.approx(10.5)
    assert schedule.shift_for(zoo.build("sdxl").scheduler, 2.0) is None
    assert schedule.shift_for(zoo.build("flux").scheduler, 2.0) is None
