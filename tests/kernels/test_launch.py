"""What Triton launches share: the short way, strides in units, and tiles that fit small cards."""

import importlib.util
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton_process import run_apart

from fastdiff.kernels import hopper
from fastdiff.kernels import launch as module
from fastdiff.kernels.launch import large, launch, strides_in_units

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


class Kernel:
    """Stands for a kernel: compiles to itself, keeps what it is launched with."""

    arg_names = ("x", "y", "N", "BLOCK")

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **settings: Any) -> "Kernel":
            self.launches.append((grid, args, settings, torch.cuda.current_device()))
            return self

        return run


@pytest.fixture
def gpus(monkeypatch):
    """CPU tensors pass for those of GPU 1; GPU 0 is the current one."""
    current = [0]

    @contextmanager
    def on(device: int):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(module, "_ready", {})


def test_a_repeated_launch_takes_the_short_way(gpus):
    kernel, x, y = Kernel(), torch.zeros(4), torch.ones(4)
    for a, b in ((x, y), (y, x)):
        launch(kernel, (7,), a, b, 5, BLOCK=16, num_warps=4)
    first, second = kernel.launches
    # on the device of the tensors, whatever the current one is
    assert first == ((7,), (x, y, 5), {"BLOCK": 16, "num_warps": 4}, 1)
    # its own tensors, and what triton adds: numbers of compile time in the kernel's order
    assert second[0] == (7, 1, 1) and second[2:] == ({}, 1)
    assert second[1][0] is y and second[1][1] is x and second[1][2:] == (5, 16)


@pytest.mark.parametrize("other", ["dtype", "number", "setting", "option", "grid"])
def test_another_call_is_looked_at(gpus, other):
    kernel, x = Kernel(), torch.zeros(4)
    launch(kernel, (7,), x, x, 5, BLOCK=16, num_warps=4)
    y = x.half() if other == "dtype" else x
    launch(kernel, (8,) if other == "grid" else (7,), x, y, 6 if other == "number" else 5,
           BLOCK=32 if other == "setting" else 16, num_warps=8 if other == "option" else 4)
    assert [bool(settings) for _, _, settings, _ in kernel.launches] == [True, True]


def test_a_pointer_that_is_not_aligned_is_looked_at(gpus):
    kernel, x = Kernel(), torch.zeros(8)
    for y in (x[1:], x, x[1:], x):
        launch(kernel, (7,), x, y, 5, BLOCK=16)
    assert [bool(settings) for _, _, settings, _ in kernel.launches] == [True, True, True, False]


def test_more_programs_than_a_gpu_takes(gpus):
    kernel, x = Kernel(), torch.zeros(8)
    launch(kernel, (100_000, 65_535), x, x, 5, BLOCK=16)
    with pytest.raises(ValueError, match=r"65,536 programs .* at most 65,535; split the batch"):
        launch(kernel, (1, 65_536), x, x, 5, BLOCK=16)


def test_a_plan_is_launched_on_the_device_of_its_tensors(gpus, monkeypatch):
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    kernel = Kernel()
    plan = hopper.Plan(kernel, (), (5,), {"BLOCK": 16}, work=9)
    for _ in range(2):
        plan.launch((), (torch.zeros(4), torch.zeros(4)))
    assert [(grid, bool(settings), device) for grid, _, settings, device in kernel.launches] == [
        ((9, 1, 1), True, 1), ((9, 1, 1), False, 1)]
