"""Bottleneck sampling piece by piece: schedules, clean estimates, changes of size, settings."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json

import diffusers
import pytest
import torch

from fastdiff.config import from_plan, make_methods, to_plan
from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage
from fastdiff.pipelines.staged.noise import (
    Level,
    clean_estimate,
    kind_of,
    level_at,
    level_of,
    ratio_of,
)
from fastdiff.pipelines.staged.schedule import Span, first_level, flow_levels, own_copy, write
from fastdiff.pipelines.staged.stages import stage_end
from fastdiff.pipelines.staged.transition import RESIZES, match, renoise, resize, smaller_noise

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "flow-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-euler-terminal": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1),
    "flow-unipc": lambda: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "flow-dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "flow-deis": lambda: diffusers.DEISMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**_SD),
    "euler-karras": lambda: diffusers.EulerDiscreteScheduler(**_SD, use_karras_sigmas=True),
    "euler-v": lambda: diffusers.EulerDiscreteScheduler(**_SD, prediction_type="v_prediction"),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**_SD),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**_SD),
    "dpm-karras": lambda: diffusers.DPMSolverMultistepScheduler(**_SD, use_karras_sigmas=True),
    "dpm-exponential": lambda: diffusers.DPMSolverMultistepScheduler(
        **_SD, use_exponential_sigmas=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**_SD),
    "deis": lambda: diffusers.DEISMultistepScheduler(**_SD),
    "ddim": lambda: diffusers.DDIMScheduler(**_SD, clip_sample=False),
    "ddim-v": lambda: diffusers.DDIMScheduler(
        **_SD, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    "ddpm": lambda: diffusers.DDPMScheduler(**_SD, clip_sample=False),
    "pndm": lambda: diffusers.PNDMScheduler(**_SD, skip_prk_steps=True),
    "cogvideox-ddim": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    "cogvideox-dpm": lambda: diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction"),
}
STRIDED = {"ddim", "ddim-v", "ddpm", "pndm", "cogvideox-ddim", "cogvideox-dpm"}
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def _written(name, span):
    scheduler = own_copy(SCHEDULERS[name]())
    arguments = {"num_inference_steps": 40, "device": "cpu"}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = 1.0
    write(scheduler, span, arguments, None)
    return scheduler


def test_published_schedule():
    """4, 13 and 8 steps at strengths 1, 0.8, 0.6 and shifts 9, 6, 9, as published."""
    first = flow_levels(Span(4, 1.0), 9.0)
    assert first.tolist() == pytest.approx([1.0, 0.964, 0.900, 0.750], abs=5e-4)
    second = flow_levels(Span(13, 0.96), 6.0)
    assert second.tolist() == pytest.approx(
        [0.960, 0.944, 0.926, 0.906, 0.882, 0.853, 0.820, 0.778, 0.727, 0.662, 0.576, 0.457, 0.282],
        abs=5e-4)
    third = flow_levels(Span(8, 9 * 0.6 / (1 + 8 * 0.6)), 9.0)
    assert third.tolist() == pytest.approx(
        [0.931, 0.909, 0.880, 0.844, 0.794, 0.723, 0.614, 0.422], abs=5e-4)


@each_scheduler
@pytest.mark.parametrize("span", [Span(6, 0.8), Span(5, 0.8, 0.5), Span(7, 1.0, 0.6), Span(1, 0.7)],
                         ids=str)
def test_schedule_does_what_the_stage_says(name, span):
    scheduler = _written(name, span)
    kind = kind_of(scheduler)
    extra = int(name == "pndm" and span.steps > 1)  # PNDM makes its second evaluation twice
    assert len(scheduler.timesteps) == span.steps + extra
    shares = [level_at(scheduler, kind, i).share for i in range(len(scheduler.timesteps))]
    top = 1.0 if kind == "flow" else _top(scheduler)
    # fixed strides start on a whole timestep that lets them end on clean
    near = 0.01 if name in STRIDED else 2e-3
    assert shares[0] == pytest.approx(min(span.start, top), abs=near)
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    assert shares[-1] > span.end
    times = scheduler.timesteps.tolist()
    assert times == sorted(times, reverse=True)
    if name in STRIDED:
        stride = 1000 // scheduler.num_inference_steps
        assert times[-1] >= 0 and (span.end or times[-1] - stride < 0)
    else:
        clean = 0.0 if name != "deis" else level_of(kind, _ratio(scheduler, 0)).share
        end = level_of(kind, float(scheduler.sigmas[-1])).share
        assert end == pytest.approx(span.end or clean, abs=2e-3)


def _ratio(scheduler, timestep):
    kept = float(scheduler.alphas_cumprod[timestep].clamp_min(1e-12))
    return ((1 - kept) / kept) ** 0.5


def _top(scheduler):
    return _ratio(scheduler, -1) / (1 + _ratio(scheduler, -1))


@each_scheduler
def test_a_whole_native_stage_is_the_scheduler_s_own(name):
    scheduler, stock = _written(name, Span(9, 1.0)), SCHEDULERS[name]()
    stock.set_timesteps(
        9, device="cpu", **({"mu": 1.0} if stock.config.get("use_dynamic_shifting") else {}))
    assert torch.equal(scheduler.timesteps, stock.timesteps)
    if hasattr(stock, "sigmas"):
        assert torch.equal(scheduler.sigmas, stock.sigmas)


@pytest.mark.parametrize("name", ["dpm", "euler", "flow-euler", "flow-unipc"])
def test_shift_multiplies_noise_to_signal(name):
    """In the middle of a stage, at a start that hides the shift from its first level."""
    plain, shifted = (_written(name, Span(8, 1.0, 0.0, shift)) for shift in (1.0, 3.0))
    kind = kind_of(plain)
    for index in (4, 7):
        ratios = [ratio_of(level_at(s, kind, index).share) for s in (plain, shifted)]
        assert ratios[1] == pytest.approx(3 * ratios[0], rel=0.03)


def test_terminal_is_kept_by_a_stage_that_ends_clean():
    sigmas = _written("flow-euler-terminal", Span(5, 0.8)).sigmas
    assert sigmas[-2] == pytest.approx(0.1) and sigmas[-1] == 0
    assert _written("flow-euler-terminal", Span(5, 0.8, 0.4)).sigmas[-2] > 0.4


def test_one_step_from_noise_has_a_terminal_level_too():
    """Stock's schedule of one step with a terminal level is not a number."""
    sigmas = _written("flow-euler-terminal", Span(1, 1.0)).sigmas
    assert sigmas.tolist() == [1.0, 0.0]


def test_deis_never_takes_the_logarithm_of_zero():
    scheduler = _written("flow-deis", Span(4, 0.9))
    latents = torch.ones(1, 1, 2, 2)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(torch.ones_like(latents), timestep, latents).prev_sample
    assert latents.isfinite().all()


def test_strided_schedulers_refuse_a_shift():
    with pytest.raises(ValueError, match="fixed stride"):
        _written("ddim", Span(5, 0.8, 0.0, 3.0))


@pytest.mark.parametrize("make, reason", [
    (lambda: diffusers.HeunDiscreteScheduler(), "cannot run in stages"),
    (lambda: diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True), "use_lu_lambdas=False"),
    (lambda: diffusers.PNDMScheduler(), "skip_prk_steps=True"),
])
def test_other_schedulers_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        kind_of(make())


@each_scheduler
def test_clean_estimate_undoes_the_noise(name):
    """The output a perfect model would give, by the definition of its prediction type."""
    scheduler = _written(name, Span(6, 0.8))
    level = level_at(scheduler, kind_of(scheduler), 2)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    norm = (level.signal**2 + level.noise**2) ** 0.5
    outputs = {"epsilon": noise, "flow_prediction": noise - clean,
               "v_prediction": (level.signal * noise - level.noise * clean) / norm}
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    found = clean_estimate(scheduler, level, outputs[prediction], renoise(clean, noise, level))
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddim-v", "euler", "euler-v", "cogvideox-ddim"])
def test_clean_estimate_is_the_scheduler_s_own(name):
    scheduler = _written(name, Span(6, 0.8))
    level = level_at(scheduler, kind_of(scheduler), 0)
    output, sample = torch.randn(2, 1, 4, 6, 6).unbind(0)
    found = clean_estimate(scheduler, level, output, sample)
    step = scheduler.step(output, timestep=scheduler.timesteps[0], sample=sample)
    own = step.pred_original_sample
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("size", [(7, 5), (14, 9), (29, 31)])
def test_constant_latents_stay_constant(how, size):
    latents = torch.tensor([-1.5, 0.0, 2.0]).view(1, 3, 1, 1, 1).expand(2, 3, 4, 14, 9)
    rows, columns = size
    found = resize(latents, rows, columns, how)
    assert found.shape == (2, 3, 4, *size)
    torch.testing.assert_close(found, latents[..., :1, :1].expand_as(found), rtol=0, atol=1e-5)


def test_frames_are_resized_alone():
    latents = torch.randn(1, 2, 3, 8, 8)
    whole = resize(latents, 4, 4, "bicubic")
    for frame in range(3):
        alone = resize(latents[:, :, frame], 4, 4, "bicubic")
        torch.testing.assert_close(whole[:, :, frame], alone)


@each_scheduler
def test_variance_of_a_channel_after_new_noise(name):
    """signal^2 Var(clean) + noise^2, within five standard errors, at the level that follows."""
    level = first_level(_written(name, Span(6, 0.8)))
    generator = torch.Generator().manual_seed(1)
    spreads = torch.tensor([0.2, 1.0, 3.0]).view(1, 3, 1, 1)
    clean = spreads * torch.randn(1, 3, 160, 160, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    found = renoise(clean, noise, level).var((0, 2, 3))
    wanted = level.signal**2 * clean.var((0, 2, 3)) + level.noise**2
    bound = 5 * (2 / 160**2) ** 0.5
    assert ((found / wanted - 1).abs() < 2 * bound).all()


def test_implied_noise_brings_the_latent_back():
    """Two stages of one size in continue mode are one, where the noise is the latent's own."""
    scheduler = _written("flow-euler", Span(6, 0.8))
    level = level_at(scheduler, "flow", 3)
    z, velocity = torch.randn(2, 1, 4, 6, 6).unbind(0)
    clean = clean_estimate(scheduler, level, velocity, z)
    torch.testing.assert_close(renoise(clean, z + (1 - level.noise) * velocity, level), z)


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (128, 191)])
def test_smaller_noise_has_unit_variance(size):
    noise = torch.randn(1, 2, 128, 192, generator=torch.Generator().manual_seed(2))
    found = smaller_noise(noise, *size)
    assert found.shape[-2:] == size
    bound = 5 * (2 / (size[0] * size[1])) ** 0.5
    # neighbours that share cells count less than they are many
    assert ((found.var((0, 2, 3)) - 1).abs() < 2 * bound).all()
    if size == (64, 96):
        _assert_white(found[0, 0])
        assert torch.equal(smaller_noise(noise, 128, 192), noise)
    with pytest.raises(ValueError, match="larger"):
        smaller_noise(noise, 256, 192)


def _assert_white(field):
    """Neighbours in both directions do not correlate."""
    n = field.numel()
    for moved in (field[1:] * field[:-1], field[:, 1:] * field[:, :-1]):
        assert abs(float(moved.mean() / field.var())) < 5 / n**0.5


@pytest.mark.parametrize("kind", ["flow", "preserving", "exploding"])
@pytest.mark.parametrize("k, up", [(2, True), (3, True), (2, False)])
def test_matched_noise_is_white_and_of_the_level_it_says(kind, k, up):
    generator = torch.Generator().manual_seed(3)
    sigma = 0.6 if kind == "flow" else 1.5
    level = level_of(kind, sigma)
    rows, columns = (60, 84) if up else (120, 168)
    other = (rows * k, columns * k) if up else (rows // k, columns // k)
    clean = torch.tensor([0.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, rows, columns)
    z = renoise(clean, torch.randn(clean.shape, generator=generator), level)
    found, after = match(z, level, torch.randn((1, 2, *other), generator=generator), kind)
    factor = k if up else 1 / k
    assert ratio_of(after.share) == pytest.approx(factor * ratio_of(level.share), rel=1e-6)
    sums = {"flow": after.signal + after.noise, "exploding": after.signal,
            "preserving": after.signal**2 + after.noise**2}
    assert sums[kind] == pytest.approx(1.0)
    noise = (found - after.signal * clean[..., :1, :1]) / after.noise
    for channel in noise[0]:
        assert float(channel.mean()) == pytest.approx(0, abs=5 / channel.numel() ** 0.5)
        assert float(channel.var()) == pytest.approx(1, abs=5 * (2 / channel.numel()) ** 0.5)
        _assert_white(channel)


def test_matched_stages_meet():
    """What a stage ends with becomes, by the change of size, what the next one starts with."""
    before, after = Stage(0.5, 5, 1.0), Stage(1.0, 5, 0.6)
    end = stage_end(before, after, "matched-noise")
    assert ratio_of(end) * 2 == pytest.approx(ratio_of(0.6))
    _, level = match(torch.zeros(1, 1, 4, 4), Level(1 - end, end), torch.zeros(1, 1, 8, 8), "flow")
    assert level.share == pytest.approx(0.6)


def test_settings_round_trip_as_json():
    given = BottleneckSampling(stages=[Stage(1.0, 4), Stage(0.5, 0.5, 0.9, 2.0), Stage(1, 3, 0.7)],
                               transition="continue", noise="correlated")
    for method in (given, BottleneckSampling(), BottleneckSampling("fast")):
        plan = json.loads(json.dumps(to_plan([method])))
        assert from_plan(plan) == (method,)
    assert make_methods(["bottleneck"], {"preset": "video"}) == (BottleneckSampling("video"),)


def test_stages_in_words():
    found = BottleneckSampling(stages="1:8, 0.5:0.25:0.93, 1:12:0.85:3").chosen.stages
    assert found == (Stage(1.0, 8), Stage(0.5, 0.25, 0.93), Stage(1.0, 12, 0.85, 3.0))
    assert isinstance(found[0].steps, int) and isinstance(found[1].steps, float)


@pytest.mark.parametrize("settings, reason", [
    ({"preset": "slow"}, "preset='slow'.*balanced or fast or video"),
    ({"preset": "fast", "stages": "1:4"}, "not both"),
    ({"stages": []}, "a list of Stage"),
    ({"stages": "1:x"}, "scale:steps:sigma_start:shift"),
    ({"stages": [{"size": 1}]}, "is not a stage"),
    ({"stages": [Stage(1, 4, 0.9)]}, "starts from noise"),
    ({"stages": [Stage(1, 4), Stage(0.5, 4, 0.9)]}, "size it was asked for"),
    ({"stages": [Stage(0.5, 4), Stage(1, 4, 0.9)], "noise": "correlated"}, "fresh"),
    ({"stages": [Stage(0.75, 4), Stage(1, 4, 0.9)], "transition": "matched-noise"}, "whole number"),
    ({"stages": [Stage(1, 4), Stage(0.5, 4, 0.6), Stage(1, 4, 0.7)], "transition": "continue"},
     "less than where the stage before starts"),
    ({"transition": "jump"}, "restart or continue or matched-noise"),
    ({"resize": "lanczos"}, "bicubic or bilinear or area or nearest"),
    ({"noise": "old"}, "fresh or correlated"),
])
def test_settings_that_make_no_run_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        BottleneckSampling(**settings)


@pytest.mark.parametrize("settings", [
    {"scale": 0.0}, {"scale": 1.5}, {"steps": 0}, {"steps": 1.5}, {"sigma_start": 0.0},
    {"sigma_start": 1.1}, {"shift": 0.0},
])
def test_stages_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="is not possible: accepted is"):
        Stage(**settings)


def test_the_command_line_knows_it():
    from fastdiff.cli.choice import plan

    found = plan("bottleneck", None, {"preset": "fast"}, None)
    assert found is not None and from_plan(found) == (BottleneckSampling("fast"),)
    found = plan("bottleneck", None, {"stages": "1:8, 0.5:16:0.93, 1:12:0.85"}, None)
    assert found is not None
    assert from_plan(found)[0].to_dict()["stages"][1]["steps"] == 16
