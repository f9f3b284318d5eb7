"""Bottleneck sampling inside the calls of tiny pipelines: what holds for every family."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json

import diffusers
import pytest
import torch
import zoo
from torch import Tensor

import fastdiff
from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage
from fastdiff.pipelines.families import family_of
from fastdiff.pipelines.staged import run as staged_run

STAGES = (Stage(1, 1), Stage(0.5, 2, 0.9), Stage(1, 2, 0.7))
STEPS = sum(stage.count(0) for stage in STAGES)
each_family = pytest.mark.parametrize("name", zoo.NAMES)
# schedulers with exact levels and without; the multistep ones among both
SCHEDULERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpm-karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}


# UNets this small spend their time in convolutions over many cells
SMALL = {"sd15": (1, 8, 9), "sdxl": (1, 6, 7)}


def call(name, pipe, **changes):
    return zoo.call(name, pipe, **{"grid": SMALL.get(name), **changes})


def staged(**changes):
    return BottleneckSampling(**{"stages": STAGES, "force": True, **changes})


def state_of(scheduler):
    """Everything in a scheduler, as comparable values."""
    state = {}
    for key, value in vars(scheduler).items():
        if not key.startswith("_fastdiff"):
            state[key] = value.tolist() if isinstance(value, Tensor) else repr(value)
    return type(scheduler), json.dumps(dict(scheduler.config), default=str), state


def _watch(pipe):
    """Shapes of the first argument of every denoiser forward, and all its arguments."""
    seen = []
    model = zoo.denoiser(pipe)

    def look(module, args, kwargs):
        latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        seen.append((tuple(latents.shape), {**kwargs}))

    return seen, model.register_forward_pre_hook(look, with_kwargs=True)


@each_family
def test_one_stage_is_stock_bit_for_bit(name):
    pipe = zoo.build(name)
    stock = call(name, pipe)
    for stages in ([Stage()], [Stage(1, 2)]):
        fastdiff.enable(pipe, BottleneckSampling(stages=stages))
        assert torch.equal(call(name, pipe), stock)


@each_family
@pytest.mark.parametrize("transition", ["restart", "continue"])
def test_high_low_high_returns_the_asked_size_and_leaves_no_trace(name, transition):
    pipe = zoo.build(name)
    stock = call(name, pipe)
    before, state = zoo.fingerprint(pipe), state_of(pipe.scheduler)
    scheduler = pipe.scheduler
    fastdiff.enable(pipe, staged(transition=transition))
    seen, hook = _watch(pipe)
    out = call(name, pipe)
    hook.remove()
    assert out.shape == stock.shape and out.isfinite().all()
    assert pipe.fastdiff.clock.steps == pipe.fastdiff.clock.step == STEPS
    elements = [torch.Size(shape[1:]).numel() for shape, _ in seen]
    forwards = len(seen) // STEPS
    low = elements[forwards : 3 * forwards]
    # about a quarter of the cells, as far as small sides round
    assert max(low) < 0.4 * elements[0] and set(elements) == {elements[0], low[0]}
    assert torch.equal(call(name, pipe), out), "a seed makes the same picture again"
    assert not torch.equal(call(name, pipe, seed=1), out)
    assert pipe.scheduler is scheduler and state_of(scheduler)[1:] == state[1:]
    pipe.disable_fastdiff()
    assert zoo.fingerprint(pipe) == before and state_of(scheduler) == state
    assert torch.equal(call(name, pipe), stock)


@each_family
def test_low_first(name):
    pipe = zoo.build(name)
    stock = call(name, pipe)
    fastdiff.enable(pipe, staged(stages=[Stage(0.5, 3), Stage(1, 2, 0.8)]))
    out = call(name, pipe)
    assert out.shape == stock.shape and out.isfinite().all()
    with pytest.raises(ValueError, match="start with a stage of scale 1"):
        call(name, pipe, latents=stock)


@each_family
def test_what_depends_on_the_size_is_made_anew(name):
    """The grid that the family reads from the denoiser's arguments is the latents' own."""
    pipe = zoo.build(name)
    family = family_of(zoo.denoiser(pipe))
    assert family is not None
    fastdiff.enable(pipe, staged())
    seen, hook = _watch(pipe)
    call(name, pipe)
    hook.remove()
    model = zoo.denoiser(pipe)
    for shape, arguments in seen:
        arguments.setdefault("hidden_states", torch.empty(shape))
        if name == "flux":
            assert arguments["img_ids"].shape[0] == shape[1]
            rows, columns = (int(n) for n in arguments["img_ids"][:, 1:].amax(0) + 1)
            assert rows * columns == shape[1]
        elif name == "ltx":
            cells = arguments["num_frames"] * arguments["height"] * arguments["width"]
            assert cells == shape[1]
        elif name == "cogvideox":
            tokens = shape[1] * (shape[3] // 2) * (shape[4] // 2)
            assert arguments["image_rotary_emb"][0].shape[0] == tokens
        elif name == "sdxl":
            # not what the latents have, but what is asked for: see docs/bottleneck.md
            height, width = zoo.size(name, SMALL.get(name)).values()
            wanted = torch.tensor([height, width, 0, 0, height, width])
            assert (arguments["added_cond_kwargs"]["time_ids"] == wanted).all()
        elif family.site is None:
            layout = family.read(model, arguments)
            assert layout is not None


@each_family
@pytest.mark.parametrize("noise", ["fresh", "correlated"])
def test_noise_of_every_channel_has_the_right_strength(name, noise, monkeypatch):
    """With a clean estimate of zero, the latents after a border are noise of that level alone."""
    pipe = zoo.build(name)
    levels, crossed = [], []
    renoise, cross = staged_run.renoise, staged_run.Run._cross
    monkeypatch.setattr(staged_run, "clean_estimate",
                        lambda scheduler, level, output, sample: torch.zeros_like(sample).float())

    def spy(clean, noise, level):
        levels.append(level)
        return renoise(clean, noise, level)

    def look(run, *args):
        packed = cross(run, *args)
        latents = run._unpack(packed, run.leg).float()
        crossed.append(latents.transpose(1, 2) if name == "cogvideox" else latents)
        return packed

    monkeypatch.setattr(staged_run, "renoise", spy)
    monkeypatch.setattr(staged_run.Run, "_cross", look)
    stages = [Stage(stage.scale, 1, stage.sigma_start) for stage in STAGES]
    fastdiff.enable(pipe, staged(stages=stages, noise=noise))
    zoo.call(name, pipe)
    assert len(crossed) == len(levels) == 2
    for latents, level in zip(crossed, levels, strict=True):
        channels = latents.transpose(0, 1).flatten(1)
        n = channels.shape[1]
        strength = channels.std(1) / level.noise
        bound = 5 / (2 * n) ** 0.5
        # correlated noise at sides that do not divide shares border cells
        assert ((strength - 1).abs() < 1.5 * bound).all(), strength
        assert (channels.mean(1).abs() < 5 * level.noise / n**0.5).all()


@each_family
def test_a_batch_of_two_equals_two_runs(name):
    pipe = zoo.build(name)
    fastdiff.enable(pipe, staged())
    both = call(name, pipe, prompt=[zoo.PROMPT, "a dog"])
    zoo.assert_near(both[:1], call(name, pipe, prompt=[zoo.PROMPT]))
    zoo.assert_near(both[1:], call(name, pipe, seed=1, prompt=["a dog"]))


@pytest.mark.parametrize("name", ["wan", "flux", "sdxl", "sd3", "hunyuan_video"])
def test_matched_noise(name):
    pipe = zoo.build(name)
    grid = (3, 4, 8) if name in zoo.VIDEO else (1, 8, 12)
    # half the side takes twice the noise, and SD has no more than a share of 0.936
    stages = (Stage(1, 1), Stage(0.5, 2, 0.85), Stage(1, 2, 0.7))
    fastdiff.enable(pipe, staged(stages=stages, transition="matched-noise"))
    stock = call(name, zoo.build(name), grid=grid)
    out = call(name, pipe, grid=grid)
    assert out.shape == stock.shape and out.isfinite().all()
    for other in ("restart", "continue"):
        fastdiff.enable(pipe, staged(stages=stages, transition=other))
        assert not torch.equal(call(name, pipe, grid=grid), out)
    fastdiff.enable(pipe, staged(stages=stages, transition="matched-noise"))
    assert torch.equal(call(name, pipe, grid=grid), out)
    if name != "sdxl":  # whose cells are smaller than its units
        with pytest.raises(ValueError, match="whole multiples"):
            call(name, pipe)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_other_schedulers(kind):
    cls, options = SCHEDULERS[kind]
    pipe, grid = zoo.build("sd15"), (1, 8, 9)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    stock = call("sd15", pipe, grid=grid, num_inference_steps=3)
    fastdiff.enable(pipe, BottleneckSampling(stages=[Stage()]))
    assert torch.equal(call("sd15", pipe, grid=grid, num_inference_steps=3), stock)
    for transition in ("restart", "continue"):
        fastdiff.enable(pipe, staged(transition=transition))
        out = call("sd15", pipe, grid=grid)
        assert out.shape == stock.shape and out.isfinite().all()
        assert float(out.std()) < 20 * float(stock.std())


def test_cogvideox_with_its_own_solver():
    """Its step also takes the clean latent of the step before, which has another size."""
    pipe = zoo.build("cogvideox")
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    stock = call("cogvideox", pipe, num_inference_steps=3)
    fastdiff.enable(pipe, BottleneckSampling(stages=[Stage()]))
    assert torch.equal(call("cogvideox", pipe, num_inference_steps=3), stock)
    fastdiff.enable(pipe, staged())
    assert call("cogvideox", pipe).isfinite().all()


def test_both_wan_experts_run_by_their_noise():
    pipe = zoo.build("wan22")
    stock = call("wan22", pipe)
    border = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    seen = {"transformer": [], "transformer_2": []}
    for name, times in seen.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda _, args, kwargs, times=times: times.append(float(kwargs["timestep"].max())),
            with_kwargs=True)
    fastdiff.enable(pipe, staged())
    assert call("wan22", pipe).shape == stock.shape
    assert min(seen["transformer"]) >= border > max(seen["transformer_2"])
    assert sum(map(len, seen.values())) % STEPS == 0


def test_per_token_timesteps_follow_the_size():
    """Wan 2.2 5B tells the denoiser the timestep of every token."""
    pipe = zoo.build("wan")
    pipe.register_to_config(expand_timesteps=True)
    stock = call("wan", pipe, grid=(3, 4, 8))
    fastdiff.enable(pipe, staged())
    seen, hook = _watch(pipe)
    assert call("wan", pipe, grid=(3, 4, 8)).shape == stock.shape
    hook.remove()
    assert len({arguments["timestep"].shape for _, arguments in seen}) == 2
    levels = [float(arguments["timestep"][0, 0]) for _, arguments in seen]
    assert levels[2] == 900 and len(set(levels)) > 3  # two branches a step


def test_the_report_tells_the_stages():
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, staged())
    call("wan", pipe)
    told = pipe.fastdiff.report.methods["bottleneck"]
    assert told["stage 2"].startswith("32x64, 2 steps, noise 0.900 to 0.700")
    assert "not known" in told["smallest trained size"]
    assert "stage 2" in repr(pipe.fastdiff)


def test_stages_below_the_trained_size_are_refused_before_the_first_step():
    pipe = zoo.build("sd15")  # its configuration says 128 x 128 pixels
    fastdiff.enable(pipe, BottleneckSampling(stages=STAGES))
    seen, hook = _watch(pipe)
    with pytest.raises(ValueError, match="80x80, smaller than .* use a scale of 0.80 or more"):
        call("sd15", pipe, grid=(1, 20, 20))
    with pytest.raises(ValueError, match="use a larger picture"):
        call("sd15", pipe, grid=(1, 12, 12))
    hook.remove()
    assert not seen
    fastdiff.enable(pipe, staged())
    assert call("sd15", pipe, grid=(1, 20, 20)).isfinite().all()


def test_a_preset_takes_the_low_scale_that_the_model_knows():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, "bottleneck")
    call("sd15", pipe, grid=(1, 24, 24), num_inference_steps=10)
    assert pipe.fastdiff.report.methods["bottleneck"]["stage 2"].startswith("144x144")
    call("sd15", pipe, grid=(1, 32, 32), num_inference_steps=10)
    assert pipe.fastdiff.report.methods["bottleneck"]["stage 2"].startswith("128x128")
    with pytest.raises(ValueError, match="smaller than"):
        call("sd15", pipe, grid=(1, 16, 16), num_inference_steps=10)


@pytest.mark.parametrize("preset", ["balanced", "fast", "video"])
@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_presets_run(preset, name):
    pipe = zoo.build(name)
    pipe.enable_fastdiff("bottleneck", preset=preset, force=True)
    out = call(name, pipe, num_inference_steps=10)
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_video_preset_never_asks_for_more_noise_than_there_is(kind):
    """Levels of SD end at a noise share of 0.936; the preset names 0.96."""
    cls, options = SCHEDULERS[kind]
    pipe = zoo.build("sd15")
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = cls(**table, **options)
    fastdiff.enable(pipe, BottleneckSampling("video", force=True))
    assert call("sd15", pipe, grid=(1, 4, 4), num_inference_steps=20).isfinite().all()
    assert ", noise 0.92" in str(pipe.fastdiff.report.methods["bottleneck"]["stage 2"])


@pytest.mark.parametrize("transition, most", [("continue", "0.936"), ("matched-noise", "0.880")])
def test_more_noise_than_the_scheduler_has_is_refused_when_enabled(transition, most):
    pipe = zoo.build("sdxl")
    pipe.scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    stages = [Stage(1, 2), Stage(0.5, 2, 0.94), Stage(1, 2, 0.5)]
    with pytest.raises(ValueError, match=f"goes up to 0.936: accepted is less than {most}"):
        fastdiff.enable(pipe, staged(stages=stages, transition=transition))
    fastdiff.enable(pipe, staged(stages=stages, transition="restart"))


@pytest.mark.parametrize("arguments", [{"sigmas": [1.0, 0.5]}, {"timesteps": [900, 500]}])
def test_a_schedule_of_the_call_s_own_is_refused(arguments):
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, staged())
    with pytest.raises(ValueError, match="leave .* out"):
        call("sd15", pipe, **arguments)


def test_what_cannot_run_in_stages_is_refused_when_enabled():
    pipe = zoo.build("sd15")
    with pytest.raises(ValueError, match="a bare model"):
        fastdiff.enable(pipe.unet, staged())
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components,
                                                     requires_safety_checker=False)
    before = zoo.fingerprint(other)
    with pytest.raises(ValueError, match="Img2Img.*Accepted of this family: StableDiffusionPipe"):
        fastdiff.enable(other, staged())
    assert zoo.fingerprint(other) == before
    with pytest.raises(ValueError, match="fixed stride"):
        fastdiff.enable(pipe, staged(transition="matched-noise"))
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot run in stages"):
        fastdiff.enable(pipe, staged())
    assert not pipe.fastdiff.enabled


@pytest.mark.parametrize("cls", [
    "WanVACEPipeline", "WanVideoToVideoPipeline", "FluxImg2ImgPipeline", "FluxControlPipeline",
    "FluxInpaintPipeline", "FluxControlNetPipeline", "CogVideoXVideoToVideoPipeline",
    "CogVideoXFunControlPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline",
    "HunyuanVideoImageToVideoPipeline", "StableDiffusion3InpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionXLControlNetUnionPipeline"])
def test_pipelines_without_an_adapter_are_not_accepted(cls):
    """By the names in the families' records; a condition would meet latents of another size."""
    from fastdiff.pipelines.families import families

    names = {base.__name__ for base in getattr(diffusers, cls).__mro__}
    for family in families():
        if family.staging is not None:
            assert not names & {*family.staging.pipelines, *family.staging.conditions}
