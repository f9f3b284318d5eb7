"""The evaluator: prompts read back, verdicts on renders, and its measures on known changes."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import torch.nn.functional as F  # noqa: E402

from training.captions import COLOUR_NAMES, NAMES, plain_caption  # noqa: E402
from training.data import load_sprites, make_batch, render  # noqa: E402
from training.evaluator import Evaluator, asked  # noqa: E402
from training.sampling import held_out_scenes  # noqa: E402


@pytest.fixture(scope="module")
def judge():
    return Evaluator()


@pytest.fixture(scope="module")
def sprites():
    return load_sprites("cpu")


def renders(scenes, sprites, frames=1, edge=96, seed=0):
    return render(make_batch(scenes, random.Random(seed), frames, frames), sprites, edge)


@pytest.mark.parametrize("clip", [False, True])
def test_canonical_captions_read_back_as_their_scenes(clip):
    for scene in held_out_scenes(240, clip):
        assert asked(plain_caption(scene)) == scene


@pytest.mark.parametrize("prompt", ["a zebra on a red background", "a frog on a beach", ""])
def test_a_prompt_about_nothing_of_ours_is_refused(prompt):
    with pytest.raises(ValueError, match="names no object of ours"):
        asked(prompt)


def test_pictures_of_held_out_pairs_are_recognised_and_swapped_prompts_are_not(judge, sprites):
    scenes = held_out_scenes(24, clip=False)
    frames = renders(scenes, sprites)[:, 0]
    figures = judge.pictures(frames, [plain_caption(s) for s in scenes], low=-1.0)
    assert figures["samples"] == 24
    assert figures["object"] >= 0.95
    assert figures["colour"] >= 0.95
    same = judge.pictures(frames / 2 + 0.5, scenes, low=0.0)
    assert same["object"] == figures["object"]
    other = [f"a {NAMES[(s.obj + 9) % 40]} on a {COLOUR_NAMES[(s.colour + 5) % 12]} background"
             for s in scenes]
    wrong = judge.pictures(frames, other, low=-1.0)
    assert wrong["object"] <= 0.05
    assert wrong["colour"] <= 0.05


def test_clips_are_seen_to_move_the_way_they_do(judge, sprites):
    scenes = held_out_scenes(8, clip=True)
    video = renders(scenes, sprites, frames=9)
    figures = judge.clips(video, scenes, low=-1.0)
    assert figures["direction"] == 1.0
    back = judge.clips(video.flip(1), scenes, low=-1.0)
    assert back["direction"] == 0.0
    with pytest.raises(ValueError, match="one for each"):
        judge.clips(video, scenes[:3], low=-1.0)


def test_blur_lowers_sharpness_and_raises_distance(judge, sprites):
    scenes = held_out_scenes(40, clip=False)
    frames, again = (renders(scenes, sprites, seed=s)[:, 0] for s in (0, 1))
    soft = F.avg_pool2d(frames, 7, 1, 3, count_include_pad=False)
    assert (judge.sharpness(soft, -1.0) < 0.7 * judge.sharpness(frames, -1.0)).float().mean() > 0.9
    near, far = judge.distance(frames, again, -1.0), judge.distance(soft, again, -1.0)
    assert far > 2 * near > 0
    assert judge.distance(frames, frames, -1.0) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="neither may be empty"):
        judge.distance(frames[:0], again, -1.0)


def test_a_changing_object_is_less_stable_than_a_moving_one(judge, sprites):
    scenes = held_out_scenes(8, clip=True)[:4]
    video = renders(scenes, sprites, frames=9)
    other = renders([type(s)((s.obj + 7) % 40, s.colour, s.pattern, s.motion) for s in scenes],
                    sprites, frames=9)
    weight = torch.linspace(0, 1, 9).view(1, 9, 1, 1, 1)
    morph = video * (1 - weight) + other * weight
    moving = judge.shape_stability(video, -1.0)
    assert (moving > judge.shape_stability(morph, -1.0) + 0.02).all()
    assert moving.shape == (4,)


def test_a_range_that_is_neither_is_named(judge):
    with pytest.raises(ValueError, match="low=0.5"):
        judge.sharpness(torch.rand(1, 3, 8, 8), low=0.5)
