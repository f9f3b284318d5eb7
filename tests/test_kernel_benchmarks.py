"""What the kernel benchmarks make of failures: rows with a reason, never a crash or a loss."""

# scripts of benchmarks/ are imported by their place
# pyright: basic, reportMissingImports=false

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from timing import tried  # noqa: E402


def test_what_cannot_run_is_a_row_and_the_rest_is_timed():
    def refuses():
        raise ValueError("not on this card")

    rows, times = tried({"a": refuses, "b": lambda: torch.ones(2)}, 3, "cpu", {"name": "tiny"})
    assert rows == [{"name": "tiny", "what": "a", "failed": "ValueError: not on this card"}]
    assert list(times) == ["b"] and len(times["b"]) == 3 and min(times["b"]) > 0
