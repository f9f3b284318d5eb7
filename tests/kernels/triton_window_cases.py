"""Cases for the Triton kernel of window attention: interpreted on the CPU, compiled on a GPU."""

import pytest
import torch
from window_cases import Case, check

from fastdiff.kernels.window_attention import implementations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize("case", [
    # boxes that fit nothing, and windows at every border
    Case((3, 6, 7), (2, 3, 5), dim=16),
    Case((2, 7, 9), (2, 4, 5), (1, 2, 3), dtype=HALF, dim=40),
    Case((1, 1, 50), (1, 1, 11), (1, 1, 4), dim=16),
    Case((1, 9, 11), (1, 9, 4), dim=72, dtype=BRAIN),
    # windows of one token, and of everything
    Case((2, 3, 4), (1, 1, 1), dim=16),
    Case((2, 3, 4), (2, 3, 4), dim=16, heads=4),
    Case((1, 1, 1), (1, 1, 1), dim=16, batch=2),
    # looking back, and text on either side
    Case((4, 3, 5), (3, 3, 3), causal="t", dim=16, before=3),
    Case((3, 4, 5), (2, 3, 5), (2, 3, 2), causal="thw", dim=16, after=35, kv_heads=1),
    Case((2, 5, 6), (1, 3, 3), before=17, after=2, dim=16, strided=True),
    # masked keys; in the smallest windows some queries are left with none
    Case((2, 5, 6), (1, 2, 2), dim=16, masked=True, batch=2),
    Case((2, 5, 6), (2, 3, 3), dim=24, masked=True, before=5, after=4, dtype=BRAIN),
    Case((2, 3, 6), (1, 3, 3), dim=160),
], ids=repr)
def test_triton(case):
    args = case.build(DEVICE)
    assert not implementations(args["query"], args["key"], args["value"])["triton"]
    check(case, DEVICE, "triton")
