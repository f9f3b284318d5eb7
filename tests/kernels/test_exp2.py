"""Powers of two by a polynomial, as the Hopper kernels compute some of theirs."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from fastdiff.kernels.hopper_kernel import SERIES


def power(x: torch.Tensor) -> torch.Tensor:
    """2^x, each step rounded to float32 as the GPU does."""
    x = x.clamp_min(-127)
    shifted = x + 12582912.0
    n = shifted.view(torch.int32)
    f = (x - (shifted - 12582912.0)).double()
    p = torch.full_like(x, SERIES[0])
    for a in SERIES[1:]:
        # a fused multiply-add rounds once
        p = (p.double() * f + a).float()
    return ((n.long() << 23) + p.view(torch.int32)).to(torch.int32).view(torch.float32)


def test_series():
    x = torch.linspace(-126, 0.5, 1_000_001)
    wanted = x.double().exp2()
    assert ((power(x).double() - wanted).abs() / wanted).max() < 3e-6
    assert power(torch.zeros(1)) == 1


def test_nothing_is_left_of_masked_scores():
    assert (power(torch.tensor([-127.0, -128, -1000, -1e30])) == 0).all()
    near = power(torch.linspace(-127, -126, 1001))
    assert (near >= 0).all() and (near < 2e-38).all()
