"""What a launch asks for fits the 99 KiB of shared memory of the smallest cards, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

MOST = 99 << 10
# operation, dtype, head dim: those that with the tiles for Hopper took more
CASES = [
    ("blocks", "bfloat16", 64), ("blocks", "bfloat16", 128), ("blocks", "bfloat16", 160),
    ("blocks", "float32", 256), ("windows", "bfloat16", 128), ("windows", "float16", 256),
    ("select", "bfloat16", 256), ("linear", "float32", 128), ("linear", "float32", 256),
    ("mass", "float32", 256), ("backward", "float32", 256),
]


def launch(operation: str, dtype: torch.dtype, dim: int) -> None:
    """One call of an operation's host code."""
    from fastdiff.kernels import column_mass, linear_attention, tile_select
    from fastdiff.kernels.block_sparse_attention import triton_backward as backward
    from fastdiff.kernels.block_sparse_attention import triton_impl as blocks
    from fastdiff.kernels.window_attention import triton_impl as windows
    from fastdiff.kernels.window_attention.geometry import Window
    from fastdiff.kernels.window_attention.triton_kernel import window_attention_fwd_kernel

    x = torch.empty(1, 1000, 2, dim, dtype=dtype)
    offsets = torch.zeros(9, dtype=torch.int32)
    if operation == "blocks":
        mean = torch.empty(1, 2, 8, dim, dtype=dtype)
        lists = torch.zeros(1, 2, 8, 8, dtype=torch.int32)
        tail = (mean, mean, torch.ones(1, 8), torch.zeros(1, 2, 8, 8, dtype=torch.bool))
        blocks.run(x, x, x, lists, lists[..., 0], offsets, offsets, block_q=128, block_k=128,
                   key_mask=None, tail=tail, scale=0.1, return_lse=True)
    elif operation == "backward":
        lists, lse = torch.zeros(1, 2, 8, 8, dtype=torch.int32), torch.zeros(1, 2, 1000)
        backward.run(x, lse, x, x, x, x, lse, lists, lists[..., 0], offsets, offsets, block_q=128,
                     block_k=128, key_mask=None, tail=None, scale=0.1)
    elif operation == "windows":
        args, settings, grid = windows.arguments(
            x, x, x, x, Window((1, 30, 30), (1, 11, 13)), before=0,
            key_mask=torch.ones(1, 1000, dtype=torch.bool), scale=0.1)
        window_attention_fwd_kernel[grid](*args, **settings)
    elif operation == "select":
        mean = torch.empty(1, 2, 600, dim, dtype=dtype)
        none = torch.zeros(600, dtype=torch.bool)
        for each_row in (False, True):
            tile_select._module("triton").run(
                x, mean, torch.zeros(601, dtype=torch.int32), none, none, density=0.2, probes=1,
                each_row=each_row)
    elif operation == "linear":
        linear_attention._module("triton").run(x, x, x, eps=1e-4)
    else:
        module = column_mass._module("triton")
        lse = module.row_lse(x, x, scale=0.1)
        module.column_mass(x, x, lse, lse, scale=0.1)


def measure() -> list[list[Any]]:
    """Kernel and shared memory of each launch; needs a process of its own."""
    from test_hopper_compile import stand_in
    from triton.runtime.jit import JITFunction

    stand_in(86)
    found: list[list[Any]] = []

    def recorded(kernel: Any, grid: Any) -> Any:
        def warm(*args: Any, **settings: Any) -> None:
            shared = kernel.warmup(*args, grid=(1,), **settings).metadata.shared
            found.append([*case, kernel.__name__, shared])
        return warm

    setattr(JITFunction, "__getitem__", recorded)  # noqa: B010
    for case in CASES:
        launch(case[0], getattr(torch, case[1]), case[2])
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_tiles_fit_the_smallest_cards():
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{folder.parents[1]}:{folder}"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {tuple(row[:3]) for row in found} == set(CASES)
    assert [row for row in found if row[-1] > MOST] == []


def test_what_does_not_fit_is_refused(monkeypatch):
    from fastdiff.kernels.tile_select import triton_impl as select
    from fastdiff.kernels.token_select import triton_impl as tokens

    for module in (select, tokens):
        monkeypatch.setattr(module, "triton_reasons", lambda *args: [])
    monkeypatch.setattr(select, "large", lambda device: False)
    monkeypatch.setattr(tokens, "shared_memory", lambda device: MOST)
    device = torch.device("cpu")
    assert tokens.not_supported_reasons(device, torch.bfloat16, 8192) == []
    assert "8193 tokens are more than 8192" in tokens.not_supported_reasons(
        device, torch.bfloat16, 8193)
    x = torch.empty(1, 64, 1, 160)
    assert "needs more shared memory" in select.not_supported_reasons(x, x, 8)[0]
    assert select.not_supported_reasons(x.half(), x.half(), 8) == []


if __name__ == "__main__":
    # as if all tensors were on such a card
    from fastdiff.kernels import launch as of_cards

    of_cards.shared_memory = lambda device: MOST
    print(json.dumps(measure()))
