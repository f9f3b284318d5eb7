"""The kernels of column mass compile for Hopper without a GPU: no spills, few instructions."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

# kernel, head dim -> instructions of the loop for one exponential at most. The special function
# unit takes eight turns for one, and in these the scheduler must issue everything else.
MOST = {("lse", 40): 6, ("lse", 64): 6, ("lse", 128): 8,
        ("mass", 40): 5, ("mass", 64): 5, ("mass", 128): 7}


def compiled(kernel: str, dim: int) -> str:
    """The machine code of one kernel in half precision; needs the stand-in for a GPU."""
    import torch
    from test_hopper_compile import sass

    from fastdiff.kernels.column_mass import triton_impl, triton_kernel
    from fastdiff.kernels.launch import strides_in_units

    x = torch.empty(2, 300, 20, dim, dtype=torch.float16)
    f = torch.empty(2, 20, 300)
    strides, unit = strides_in_units(x, x)
    tables = {"lse": triton_impl.LSE, "mass": triton_impl.MASS}
    BM, BN, warps, stages = tables[kernel][triton_impl._kind(x)]
    options = {"D": dim, "BM": BM, "BN": BN, "BD": triton_impl._padded(dim), "UPCAST": False,
               "UNIT": unit, "num_warps": warps, "num_stages": stages, "grid": (1, 1)}
    sizes = (300, 300, 20, 1, 0.1)
    if kernel == "lse":
        return sass(triton_kernel.row_lse_kernel.warmup(x, x, f, *strides, *sizes, **options))
    return sass(triton_kernel.column_mass_kernel.warmup(
        x, x, f, f, f, f, *strides, *sizes, -5.7, WEIGHTED=True, SHIFT=triton_impl.SHIFT,
        **options))


def loop(text: str) -> Counter:
    """Instructions of the loop that computes most exponentials."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)([^;]*);", text)
    found = [Counter()]
    for place, code, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if code == "BRA" else None
        if target and int(target[1], 16) < int(place, 16):
            found.append(Counter(name for at, name, _ in lines
                                 if int(target[1], 16) <= int(at, 16) <= int(place, 16)))
    return max(found, key=lambda names: names["MUFU.EX2"])


def test_no_spills_and_few_instructions():
    environment = {**os.environ, "TRITON_INTERPRET": "0",
                   "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == len(MOST)
    for kernel, dim, spills, instructions, exponentials in found:
        assert spills == 0, (kernel, dim)
        # at least 32 scores a thread and turn, or the count says nothing
        assert exponentials >= 32, (kernel, dim)
        assert instructions <= MOST[kernel, dim] * exponentials, (kernel, dim)


if __name__ == "__main__":
    from test_hopper_compile import stand_in

    stand_in()
    told = []
    for case in MOST:
        machine_code = compiled(*case)
        counts = loop(machine_code)
        told.append([*case, len(re.findall(r"\b(?:LDL|STL)", machine_code)),
                     sum(counts.values()), counts["MUFU.EX2"]])
    print(json.dumps(told))
