"""What Triton launches share: strides in units, far strides, and tiles that fit small cards."""

import importlib.util

import pytest
import torch
from triton_process import run_apart

from fastdiff.kernels.launch import large, strides_in_units

FAR = """
import torch
from fastdiff.kernels.token_permute import permute_tokens
device = "cuda" if torch.cuda.is_available() else "cpu"
# the second sample lies 2**31 elements after the first; what lies between is never touched
memory = torch.empty((1 << 31) + 64, dtype=torch.int8, device=device)
x = memory.as_strided((2, 3, 16), (1 << 31, 16, 1))
x.copy_(torch.arange(96).view(2, 3, 16))
order = torch.tensor([2, 0, 1], device=device)
assert torch.equal(permute_tokens(x, order, impl="triton"), x[:, order])
print("all right")
"""


def far(stride: int) -> torch.Tensor:
    """Two samples so far from each other; no memory stands behind them."""
    return torch.empty(1, device="meta").as_strided((2, 4, 3, 40), (stride, 120, 40, 1))


@pytest.mark.parametrize(("strides", "unit"), [
    ((480,), 8), ((480, 484), 1), (((1 << 31) - 8,), 8), ((1 << 31,), 1), ((480, 1 << 33), 1)])
def test_a_stride_in_units_fits_32_bits(strides, unit):
    """A kernel multiplies in the width of what it is handed."""
    tensors = [far(stride) for stride in strides]
    found, used = strides_in_units(*tensors)
    assert used == unit
    assert [n * unit for n in found] == [n for x in tensors for n in x.stride()[:3]]
    assert unit == 1 or max(found) * unit < 1 << 31


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_sample_far_away():
    """Interpreted in a process of its own, or compiled where a GPU is."""
    done = run_apart(FAR)
    assert done.returncode == 0 and "all right" in done.stdout, done.stderr[-3000:]


def test_an_interpreter_has_all_the_memory_it_wants():
    assert large(torch.device("cpu"))
