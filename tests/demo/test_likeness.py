"""SSIM against scikit-image, the difference map, and the preview."""

import numpy as np
import pytest
import torch

from fastdiff.demo.likeness import difference, ssim
from fastdiff.demo.preview import Preview


@pytest.mark.parametrize("shape", [(1, 32, 48, 3), (3, 17, 23, 3)])
def test_ssim_equals_scikit_image(shape):
    from skimage.metrics import structural_similarity

    generator = np.random.default_rng(0)
    one = generator.random(shape, dtype="float32")
    two = np.clip(one + 0.2 * generator.standard_normal(shape).astype("float32"), 0, 1)
    wanted = [structural_similarity(
        a.astype("float64"), b.astype("float64"), data_range=1.0, channel_axis=-1,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11)
        for a, b in zip(one, two, strict=True)]
    # scikit-image crops the border that a window cannot fill, and so do we
    assert ssim(one, two) == pytest.approx(np.mean(wanted), abs=2e-4)


def test_ssim_of_equal_results_is_one_at_any_size():
    for side in (4, 10, 16):
        frames = np.random.default_rng(1).random((2, side, side, 3), dtype="float32")
        assert ssim(frames, frames) == pytest.approx(1)


def test_difference_is_black_where_equal_and_white_where_worst():
    one = np.zeros((1, 8, 8, 3), dtype="float32")
    two = one.copy()
    two[0, 2:6, 2:6, 1] = 0.5
    found, top = difference(one, two)
    assert top == pytest.approx(0.5, rel=1e-3)
    assert found[0, 0, 0].max() == 0 and found[0, 3, 3].min() == 1
    assert difference(one, one)[0].max() == 0


class _Scheduler:
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def test_the_line_through_two_steps_ends_at_the_picture():
    clean, noise = torch.randn(2, 1, 4, 3, 5, 5)
    preview = Preview()
    for step in range(3):
        sigma = float(_Scheduler.sigmas[step + 1])
        found = preview.clean((1 - sigma) * clean + sigma * noise, _Scheduler, step)
        if step:
            torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)


def test_the_fit_finds_a_linear_decoder_and_draws():
    torch.manual_seed(1)
    latents, matrix = torch.randn(1, 4, 2, 8, 8), torch.rand(4, 3) * 0.1
    frames = torch.einsum("cfhw,cd->fhwd", latents[0], matrix) + 0.5
    preview = Preview()
    assert preview.picture(latents) is None
    preview.fit(latents, frames.numpy())
    assert preview._matrix is not None
    torch.testing.assert_close(preview._matrix[:4], matrix, atol=2e-3, rtol=0)
    assert (preview.picture(latents) or b"")[:2] == b"\xff\xd8"
    # packed latents show no grid
    assert preview.picture(torch.randn(1, 64, 4)) is None
