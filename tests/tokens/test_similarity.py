"""The likeness that benchmarks report: structural similarity by its definition, in float64."""

# scripts of benchmarks/ are imported by their place
# pyright: reportMissingImports=false

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from likeness import similarity  # noqa: E402


def by_definition(a, b):
    """Windows of 11 x 11 one by one, weighed by a Gaussian of 1.5 pixels."""
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-place.square() / 4.5)
    weight = (line[:, None] * line / line.sum() ** 2).flatten()
    x, y = (side.double().unfold(2, 11, 1).unfold(3, 11, 1).flatten(-2) for side in (a, b))
    mean_x, mean_y = x @ weight, y @ weight
    var_x = (x - mean_x[..., None]).square() @ weight
    var_y = (y - mean_y[..., None]).square() @ weight
    both = ((x - mean_x[..., None]) * (y - mean_y[..., None])) @ weight
    c1, c2 = 1e-4, 9e-4
    return float(((2 * mean_x * mean_y + c1) * (2 * both + c2)
                  / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def test_similarity():
    generator = torch.Generator().manual_seed(0)
    stock = torch.rand(2, 3, 3, 24, 30, generator=generator)
    stock[1, ..., :15] = 0.5
    clips = (stock + 0.1 * torch.randn(stock.shape, generator=generator)).clamp(0, 1)
    psnr, ssim = similarity(clips, stock)
    for i in range(2):
        assert abs(ssim[i] - by_definition(clips[i], stock[i])) < 1e-5
        error = float((clips[i] - stock[i]).double().square().mean())
        assert abs(10 ** (-psnr[i] / 10) - error) < 1e-6
    assert similarity(stock, stock)[1] == [1.0, 1.0]
