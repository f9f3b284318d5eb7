"""Window attention: its windows, its boxes, and its kernel against float64."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels.window_attention import Window, chosen, implementations, window_attention
from fastdiff.kernels.window_attention.geometry import bounds, boxes, table
from fastdiff.policies.windows import axis


def test_by_hand():
    # a line of five tokens and one of text; a window of three moves inward at both ends
    zero = torch.zeros(1, 6, 1, 6)
    found = window_attention(zero, zero, torch.eye(6)[None, :, None], grid=(1, 1, 5),
                             window=(1, 1, 3), impl="reference")[0, :, 0]
    seen = [[1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1]]
    torch.testing.assert_close(found[:5], torch.tensor(seen) / 4)
    torch.testing.assert_close(found[5], torch.full((6,), 1 / 6))


axes = st.integers(1, 40).flatmap(lambda n: st.tuples(
    st.just(n), st.integers(1, n).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, k))),
    st.booleans()))


@given(axes)
def test_windows_are_those_of_the_policy(case):
    size, (window, stride), causal = case
    mine = bounds(Window((1, 1, size), (1, 1, window), (1, 1, stride), (False, False, causal)))[2]
    other = axis(size, window, stride, 1, causal)
    assert mine == (tuple(other.low.tolist()), tuple(other.high.tolist()))
    assert all(list(side) == sorted(side) for side in mine)


@settings(max_examples=40, deadline=None)
@given(st.tuples(axes, axes, axes), st.sampled_from([(16, 16), (64, 64), (128, 32)]))
def test_boxes_are_counted_right(cases, volumes):
    sizes, windows, causal = zip(*cases, strict=True)
    window = Window(sizes, tuple(w[0] for w in windows), tuple(w[1] for w in windows), causal)
    found = boxes(window, *volumes)
    assert (math.prod(found.query), math.prod(found.key)) == volumes
    steps, masked = 0, 0
    limits = bounds(window)
    ranges = [range(0, n, side) for n, side in zip(sizes, found.query, strict=True)]
    assert found.tiles == tuple(len(r) for r in ranges)
    for place in itertools.product(*ranges):
        # of each axis: for every box of keys whether all queries of the tile see all of it
        whole = []
        for (low, high), first, q, k in zip(limits, place, found.query, found.key, strict=True):
            last = min(first + q, len(low)) - 1
            starts = range(low[first], high[last], k)
            whole.append([max(low[first : last + 1]) <= s and s + k <= min(high[first : last + 1])
                          for s in starts])
        steps += math.prod(len(axis) for axis in whole)
        masked += sum(not all(one) for one in itertools.product(*whole))
    assert (found.steps, found.masked) == (steps, masked)
    assert found.steps * math.prod(volumes) >= window.pairs


def test_pairs_and_table():
    window = Window((3, 4, 5), (2, 4, 3), (1, 1, 2), (True, False, False))
    t, h, w = bounds(window)
    assert window.pairs == (1 + 2 + 2) * 16 * 15
    for side, row in enumerate(table(window, torch.device("cpu"))):
        assert row.dtype == torch.int32 and row.data_ptr() % 16 == 0
        assert row[:12].tolist() == [*t[side], *h[side], *w[side]]


@pytest.mark.parametrize("changes, words", [
    ({"window": (2, 3, 8)}, "window=8 is not possible on width of the grid"),
    ({"stride": (1, 4, 1)}, "stride=4 is not possible on height with a window of 3: accepted is 1"),
    ({"grid": (0, 3, 3)}, "has no frames"),
    ({"grid": (3, 3)}, "grid must be (frames, height, width)"),
    ({"before": 60}, "do not fit into 70 tokens"),
    ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_mask must be bool (1, 70)"),
    ({"scale": 0.0}, "scale must be positive"),
    ({"impl": "cuda"}, "impl must be 'auto' or one of"),
    ({"key": torch.zeros(1, 70, 3, 8)}, "must be [B, S, H, D]"),
    ({"query": torch.zeros(1, 70, 1, 8, dtype=torch.float64)}, "dtypes differ"),
], ids=lambda x: "" if isinstance(x, dict) else x[:20])
def test_errors_are_kind(changes, words):
    q = torch.zeros(1, 70, 1, 8)
    args = {"query": q, "key": q, "value": q, "grid": (2, 5, 7), "window": (2, 3, 3),
            "impl": "reference", **changes}
    with pytest.raises(ValueError) as raised:
        window_attention(**args)
    assert words in str(raised.value)


def test_choice():
    q = torch.zeros(1, 70, 1, 8)
    assert implementations(q, q, q)["reference"] == []
    assert chosen(q, q, q, impl="reference") == "reference"
    with pytest.raises(ValueError, match="impl='reference' runs anywhere"):
        chosen(q, q, q)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_cases():
    # triton decides at import whether to interpret, and another test may have imported it already
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name("triton_window_cases.py")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
