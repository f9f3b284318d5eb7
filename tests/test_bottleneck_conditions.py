"""Stages in pipelines whose loop joins the latents with a condition of a picture's size."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import pytest
import torch
import zoo
import zoo_conditions as conditioned
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

import fastdiff
from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage
from fastdiff.pipelines.families.base import Size
from fastdiff.pipelines.staged.conditions import cover, once_a_size, smaller_picture
from fastdiff.pipelines.staged.per_stage import PerStage, at, hold
from fastdiff.policies.tile_sparse import TileSparse

STAGES = (Stage(1, 1), Stage(0.5, 2, 0.9), Stage(1, 1, 0.7))
STEPS = 4
# the first step and the last are at full size
FULL, LOW = (0, 3), (1, 2)
each = pytest.mark.parametrize("name", conditioned.NAMES)
BLENDED = ("sd15-inpaint", "sdxl-inpaint")
GRIDS = {"wan": (3, 4, 6), "cogvideox": (5, 4, 6), "flux": (1, 6, 8), "sd15": (1, 12, 8),
         "sdxl": (1, 6, 8)}


def staged(**changes):
    return BottleneckSampling(**{"stages": STAGES, "force": True, **changes})


def _grid(name):
    return next(grid for start, grid in GRIDS.items() if name.startswith(start))


def _watch(name, pipe):
    """The condition in every forward, by step: joined to the latents, or given to a ControlNet."""
    seen: list[list[Tensor]] = []
    control = getattr(pipe, "controlnet", None)

    def look(module, args, kwargs):
        for given in (*args, *kwargs.values()):
            parts = given if isinstance(given, list) else [given]
            assert not any(isinstance(part, PerStage) for part in parts)
        latents = args[0] if args else kwargs["hidden_states"]
        if control is not None:
            given = kwargs["controlnet_cond"]
            found = given if isinstance(given, list) else [given]
        elif name == "flux-kontext":
            ids = kwargs["img_ids"]
            tokens = int((ids[:, 0] == 0).sum())
            assert latents.shape[1] == len(ids)
            found = [latents[:, tokens:], ids]
        elif name == "flux-fill":
            found = [latents[..., 16:], kwargs["img_ids"]]
        elif name == "wan-i2v-5b":
            found = [latents[:, :, 0], (kwargs["timestep"] == 0).float()]
        else:
            channels = 16 if name.startswith("wan") else 4
            found = [latents[:, :, 4:] if name.startswith("cogvideox") else latents[:, channels:]]
        seen.append([x.clone() for x in found])

    (control or zoo.denoiser(pipe)).register_forward_pre_hook(look, with_kwargs=True)

    def by_step(steps):
        forwards = len(seen) // steps
        return [seen[step * forwards] for step in range(steps)]

    return by_step


def _smaller(name, pipe, arguments, height, width):
    """The same call at a smaller size, with the user's picture and mask made smaller."""
    processor = next(getattr(pipe, n) for n in ("control_image_processor", "video_processor",
                                                "image_processor") if hasattr(pipe, n))

    def shrink(picture):
        full = processor.preprocess(picture, arguments["height"], arguments["width"])
        made = smaller_picture(full, height, width)
        return made / 2 + 0.5 if processor.config.do_normalize else made

    picture = arguments["image"]
    found = {**arguments, "height": height, "width": width}
    found["image"] = [shrink(p) for p in picture] if isinstance(picture, list) else shrink(picture)
    if "mask_image" in arguments:
        mask = pipe.mask_processor.preprocess(
            arguments["mask_image"], arguments["height"], arguments["width"])
        found["mask_image"] = cover(mask, height, width)
    if "max_area" in arguments:
        found["max_area"] = height * width
    return found


@each
def test_one_stage_is_stock_bit_for_bit(name):
    pipe = conditioned.build(name)
    stock = conditioned.call(name, pipe)
    fastdiff.enable(pipe, BottleneckSampling(stages=[Stage()]))
    assert torch.equal(conditioned.call(name, pipe), stock)


@pytest.mark.parametrize("name, transition", [
    *((name, "restart") for name in conditioned.NAMES),
    *((name, "continue") for name in ("wan-i2v-5b", "flux-fill", "sd15-inpaint"))])
def test_high_low_high_returns_the_asked_size_and_leaves_no_trace(name, transition):
    pipe = conditioned.build(name)
    stock = conditioned.call(name, pipe)
    before = zoo.fingerprint(pipe)
    processors = {key: {*vars(part)} for key, part in vars(pipe).items()
                  if key.endswith("_processor") and part is not None}
    fastdiff.enable(pipe, staged(transition=transition))
    out = conditioned.call(name, pipe)
    assert out.shape == stock.shape and out.isfinite().all() and type(out) is Tensor
    assert pipe.fastdiff.clock.steps == pipe.fastdiff.clock.step == STEPS
    assert torch.equal(conditioned.call(name, pipe), out), "a seed makes the same picture again"
    pipe.disable_fastdiff()
    assert zoo.fingerprint(pipe) == before
    assert processors == {key: {*vars(getattr(pipe, key))} for key in processors}
    assert torch.equal(conditioned.call(name, pipe), stock)


@pytest.mark.parametrize("name", [n for n in conditioned.NAMES if n not in BLENDED])
def test_every_stage_has_the_condition_of_its_size(name, monkeypatch):
    """Full size: stock's, bit for bit. Low: that of a stock call with a smaller picture."""
    pipe, grid = conditioned.build(name), _grid(name)
    arguments = conditioned.arguments(name, grid)
    seen = _watch(name, pipe)
    stock_latents = conditioned.call(name, pipe, grid=grid, num_inference_steps=1)
    stock, = seen(1)
    fastdiff.enable(pipe, staged())
    seen = _watch(name, pipe)
    conditioned.call(name, pipe, grid=grid)
    steps = seen(STEPS)
    for step in FULL:
        for found, wanted in zip(steps[step], stock, strict=True):
            assert torch.equal(found, wanted)

    # what an encoder draws depends on what was drawn before, and so on the size of the noise
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample",
                        lambda self, generator=None: self.mode())
    seen = _watch(name, pipe)
    conditioned.call(name, pipe, grid=grid)
    low = seen(STEPS)[LOW[0]]
    fastdiff.disable(pipe)
    seen = _watch(name, pipe)
    smaller = _smaller(name, pipe, arguments, arguments["height"] // 2, arguments["width"] // 2)
    out = conditioned.call(name, pipe, num_inference_steps=1, **smaller)
    assert out.numel() * 4 == stock_latents.numel()
    for found, wanted in zip(low, seen(1)[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert not any(torch.equal(a, b) for a, b in zip(low, stock, strict=True))


@pytest.mark.parametrize("name", BLENDED)
def test_what_is_not_masked_stays_the_picture(name):
    """These keep the known part of the latents: stock's at the end, a smaller one's on the way."""
    pipe, grid = conditioned.build(name), _grid(name)
    sizes = []

    def look(pipe, step, timestep, tensors):
        sizes.append((tensors["latents"].shape[-2:], tensors["mask"].shape[-2:]))
        return tensors

    stock = conditioned.call(name, pipe, grid=grid)
    fastdiff.enable(pipe, staged())
    out = conditioned.call(name, pipe, grid=grid, callback_on_step_end=look,
                           callback_on_step_end_tensor_inputs=["latents", "mask"])
    full = stock.shape[-2:]
    low = torch.Size(n // 2 for n in full)
    assert sizes == [(low, low), (low, low), (full, full), (full, full)]
    left, right = out.split(out.shape[-1] // 2, dim=-1)
    kept = stock.split(out.shape[-1] // 2, dim=-1)
    assert torch.equal(left[..., 0], kept[0][..., 0])
    assert not torch.equal(right, kept[1])


@each
def test_low_first(name):
    pipe = conditioned.build(name)
    stock = conditioned.call(name, pipe, num_inference_steps=1)
    fastdiff.enable(pipe, staged(stages=[Stage(0.5, 2), Stage(1, 1, 0.8)]))
    ids = []
    zoo.denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: ids.append((kwargs.get("added_cond_kwargs") or {})
                                                .get("time_ids")), with_kwargs=True)
    out = conditioned.call(name, pipe)
    assert out.shape == stock.shape and out.isfinite().all()
    if name.startswith("sdxl"):
        size = zoo.size("sdxl")
        wanted = torch.tensor([size["height"], size["width"], 0, 0, size["height"], size["width"]])
        assert all(torch.equal(row, wanted.to(row)) for found in ids for row in found)


@each
def test_a_batch_of_two_equals_two_runs(name):
    pipe = conditioned.build(name)
    fastdiff.enable(pipe, staged())
    given, both, alone = conditioned.arguments(name), {}, [{}, {}]
    if name in conditioned.MASKED or name == "cogvideox-i2v":
        # these encode one picture a prompt, each with its own generator
        pictures = [given["image"], conditioned.picture(given["width"], given["height"], seed=2)]
        both, alone = {"image": pictures}, [{"image": [picture]} for picture in pictures]
    if name in conditioned.MASKED:
        both["mask_image"] = [given["mask_image"]] * 2
    out = conditioned.call(name, pipe, prompt=[zoo.PROMPT, "a dog"], **both)
    zoo.assert_near(out[:1], conditioned.call(name, pipe, prompt=[zoo.PROMPT], **alone[0]))
    zoo.assert_near(out[1:], conditioned.call(name, pipe, seed=1, prompt=["a dog"], **alone[1]))


def test_pictures_encoded_by_a_processor_of_their_own_keep_their_size():
    """A reference of Kontext has a size of its own; it follows the scale."""
    pipe = conditioned.build("flux-kontext")
    seen = _watch("flux-kontext", pipe)
    fastdiff.enable(pipe, staged())
    reference = conditioned.picture(48, 64)
    grid = GRIDS["flux"]
    conditioned.call("flux-kontext", pipe, grid=grid, image=reference)
    steps = seen(STEPS)
    full, low = (steps[n][1] for n in (0, 1))
    for ids, part in ((full, 1), (low, 2)):
        rows, columns = (int(n) + 1 for n in ids[ids[:, 0] == 1][:, 1:].amax(0))
        assert (rows, columns) == (64 // 4 // part, 48 // 4 // part)
        rows, columns = (int(n) + 1 for n in ids[ids[:, 0] == 0][:, 1:].amax(0))
        assert (rows, columns) == (grid[1] // part, grid[2] // part)


def test_kontext_without_a_picture():
    pipe = conditioned.build("flux-kontext")
    fastdiff.enable(pipe, staged())
    assert conditioned.call("flux-kontext", pipe, image=None).isfinite().all()


def test_a_last_frame_is_a_condition_too():
    pipe = conditioned.build("wan-i2v")
    seen = _watch("wan-i2v", pipe)
    size = conditioned.arguments("wan-i2v", GRIDS["wan"])
    last = conditioned.picture(size["width"], size["height"], seed=3)
    conditioned.call("wan-i2v", pipe, grid=GRIDS["wan"], last_image=last, num_inference_steps=1)
    stock = seen(1)[0][0]
    fastdiff.enable(pipe, staged())
    seen = _watch("wan-i2v", pipe)
    conditioned.call("wan-i2v", pipe, grid=GRIDS["wan"], last_image=last)
    steps = seen(STEPS)
    assert torch.equal(steps[3][0], stock) and steps[1][0].shape[-1] * 2 == stock.shape[-1]
    # the mask of known frames: the first and the last one of the clip
    assert steps[1][0][0, :4, :, 0, 0].sum(0).tolist() == stock[0, :4, :, 0, 0].sum(0).tolist()


def test_matched_noise_and_the_user_s_latents():
    pipe = conditioned.build("flux-fill")
    grid = GRIDS["flux"]
    latents = torch.randn(1, grid[1] * grid[2], 16, generator=torch.Generator().manual_seed(5))
    fastdiff.enable(pipe, staged(transition="matched-noise"))
    one, other = (conditioned.call("flux-fill", pipe, grid=grid, latents=latents, seed=seed)
                  for seed in (0, 0))
    assert torch.equal(one, other) and one.isfinite().all()
    assert not torch.equal(one, conditioned.call("flux-fill", pipe, grid=grid))


def test_a_schedule_that_is_set_before_the_latents_has_the_shift_of_each_size():
    """As the plain pipeline of the family has it, which sets its schedule after its latents."""
    times = []
    for name, pipe in (("flux", zoo.build("flux")),
                       ("flux-fill", conditioned.build("flux-fill"))):
        fastdiff.enable(pipe, BottleneckSampling("balanced", force=True))
        found = []
        zoo.denoiser(pipe).register_forward_pre_hook(
            lambda module, args, kwargs, found=found: found.append(float(kwargs["timestep"][0])),
            with_kwargs=True)
        call = conditioned.call if name == "flux-fill" else zoo.call
        call(name, pipe, grid=GRIDS["flux"], num_inference_steps=10)
        times.append(found)
    assert times[0] == pytest.approx(times[1], abs=1e-6)


@pytest.mark.parametrize("name", ["sd15-inpaint-9", "wan-i2v-5b", "flux-fill"])
def test_pictures_come_out(name):
    """Past the loop, where some pipelines use the condition or the asked size once more."""
    pipe = conditioned.build(name)
    fastdiff.enable(pipe, staged())
    out = conditioned.call(name, pipe, output_type="np")
    size = conditioned.arguments(name)
    assert out.shape[-3:] == (size["height"], size["width"], 3)


def test_a_crop_around_the_mask():
    pipe = conditioned.build("sd15-inpaint")
    fastdiff.enable(pipe, staged())
    size = conditioned.arguments("sd15-inpaint")
    out = conditioned.call("sd15-inpaint", pipe, output_type="pil", padding_mask_crop=4)
    assert out[0].size == (size["width"], size["height"])


@pytest.mark.parametrize("name, changes, reason", [
    ("sd15-inpaint", {"strength": 0.5}, "strength=0.5 starts from the picture"),
    ("sdxl-inpaint", {"strength": 0.9999}, "give strength=1.0"),
    ("flux-fill", {"strength": 0.8}, "strength=0.8"),
    ("sd15-inpaint", {"image": torch.zeros(1, 4, 12, 9)}, "image= holds latents"),
    ("sd15-inpaint-9", {"masked_image_latents": torch.zeros(1, 4, 12, 9)},
     "masked_image_latents= holds latents"),
    ("flux-kontext", {"image": torch.zeros(1, 4, 18, 22)}, "give the picture itself"),
])
def test_what_cannot_be_made_anew_is_refused_before_the_first_step(name, changes, reason):
    pipe = conditioned.build(name)
    forwards = []
    zoo.denoiser(pipe).register_forward_pre_hook(lambda *_: forwards.append(1))
    fastdiff.enable(pipe, staged())
    with pytest.raises(ValueError, match=reason):
        conditioned.call(name, pipe, **changes)
    assert not forwards
    if "strength" in changes:
        # with one stage that is stock's nothing has to be made anew
        fastdiff.enable(pipe, BottleneckSampling(stages=[Stage()]))
        assert conditioned.call(name, pipe, **changes).isfinite().all()


def test_weights_with_places_of_one_size_are_refused_when_enabled():
    """CogVideoX 5B image to video has learned places."""
    pipe = conditioned.cogvideox_with_learned_places()
    with pytest.raises(ValueError, match="learned embedding for every place of one size"):
        fastdiff.enable(pipe, staged())
    assert not pipe.fastdiff.enabled
    fastdiff.enable(pipe, BottleneckSampling(stages=[Stage(1, 2), Stage(1, 1, 0.5)]))


def test_masks_cover_and_pictures_keep_their_range():
    mask = torch.zeros(1, 1, 30, 40)
    mask[..., 17, :] = 1
    found = cover(mask, 12, 17)
    assert found.shape == (1, 1, 12, 17) and set(found.unique().tolist()) == {0.0, 1.0}
    assert found.amax((0, 1, 3)).tolist() == [float(n in (6, 7)) for n in range(12)]
    assert cover(torch.ones(1, 1, 30, 40), 7, 9).min() == 1
    picture = (torch.rand(1, 3, 30, 40) > 0.5).float() * 2 - 1
    small = smaller_picture(picture, 15, 21)
    assert small.shape == (1, 3, 15, 21) and small.min() >= -1 and small.max() <= 1


class _Call:
    """Three stages; the one in the middle is small."""

    looping, index, last = False, 0, 2

    def twin(self, index):
        return 2 if index == 0 else index


def test_a_condition_is_followed_before_the_loop_and_used_in_it():
    call, full = _Call(), torch.arange(16.0).view(1, 1, 4, 4)
    made = []
    held = PerStage.of(call, full, lambda i: (made.append(i), full[..., ::2, ::2])[1])
    pair = torch.cat([held.to(torch.float64)] * 2, 1)
    first, _ = pair.chunk(2, 1)
    assert isinstance(first, PerStage)
    assert pair.shape == (1, 2, 4, 4) and not made, "a small version is made when it is asked for"
    assert first.version(1).shape == (1, 1, 2, 2) and first.version(0) is first.version(2)
    assert at({"a": [pair], "b": 1}, 1)["a"][0].shape == (1, 2, 2, 2)
    for change in (lambda: held.mul_(2), lambda: held.__setitem__(0, 1)):
        with pytest.raises(RuntimeError, match="in place"):
            change()
    call.looping, call.index = True, 1
    joined = torch.cat([torch.zeros(1, 1, 2, 2), held], 1)
    assert type(joined) is Tensor and joined.shape == (1, 2, 2, 2)
    assert made == [1]


def test_functions_that_draw_leave_the_generator_as_stock_does():
    """Once for each size, from the same state; only the first stage's call moves it on."""
    call, sizes = _Call(), [Size(8, 8, 4, 4), Size(4, 4, 2, 2), Size(8, 8, 4, 4)]

    def stock(picture, height, width, generator, latents=None):
        noise = torch.randn(height, width, generator=generator) if latents is None else latents
        return noise, picture.new_zeros(height, width)

    for first, seen in ((0, (8, 8)), (1, (4, 4))):
        generator, twin = (torch.Generator().manual_seed(3) for _ in range(2))
        bound = _bound(stock, torch.zeros(1), 8, 8, generator)
        made = once_a_size(call, sizes, first, stock, bound)
        assert torch.equal(made[2][0], torch.randn(8, 8, generator=_seed(3)))
        assert torch.equal(made[1][0], torch.randn(4, 4, generator=_seed(3)))
        torch.randn(*seen, generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())
        assert hold(call, made)[1].version(1).shape == (4, 4)


def _bound(function, *args):
    import inspect

    return inspect.signature(function).bind(*args)


def _seed(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["flux-kontext", "wan-i2v-5b", "sd15-inpaint", "sdxl-controlnet"])
def test_a_call_that_is_stopped_in_a_low_stage_has_the_asked_size(name):
    pipe = conditioned.build(name)
    stock = conditioned.call(name, pipe)
    fastdiff.enable(pipe, staged())

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 1
        return tensors

    out = conditioned.call(name, pipe, callback_on_step_end=stop)
    assert out.shape == stock.shape and out.isfinite().all()


@pytest.mark.parametrize("name", ["flux-kontext", "wan-i2v", "sd15-controlnet"])
def test_sparse_attention_beside_a_condition(name):
    pipe = conditioned.build(name)
    options = zoo.small_options(name.split("-")[0])
    strict = options.pop("strict")
    fastdiff.enable(pipe, staged(), TileSparse(**options), strict=strict)
    assert conditioned.call(name, pipe).isfinite().all()
    total = pipe.fastdiff.report.summary()
    assert total["sparse_calls"] > 0 and not total["fallbacks"]
