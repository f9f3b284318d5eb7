"""What the kernel benchmarks make of failures: rows with a reason, never a crash or a loss."""

# scripts of benchmarks/ are imported by their place
# pyright: basic, reportMissingImports=false

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kernel_cases  # noqa: E402
import record  # noqa: E402
import sanitize  # noqa: E402
from timing import tried  # noqa: E402


def test_what_cannot_run_is_a_row_and_the_rest_is_timed():
    def refuses():
        raise ValueError("not on this card")

    rows, times = tried({"a": refuses, "b": lambda: torch.ones(2)}, 3, "cpu", {"name": "tiny"})
    assert rows == [{"name": "tiny", "what": "a", "failed": "ValueError: not on this card"}]
    assert list(times) == ["b"] and len(times["b"]) == 3 and min(times["b"]) > 0


@pytest.mark.parametrize(("error", "allowed", "found"), [(0.0, 0.0, 0.0), (0.0, 2.0, 0.0),
                                                         (1.0, 4.0, 0.25), (2.0, 2.0, 1.0)])
def test_share_of_what_is_allowed(error, allowed, found):
    assert record.share(error, allowed) == found


@pytest.mark.parametrize(("error", "allowed"), [(1e-9, 0.0), (3.0, 2.0), (float("nan"), 0.0),
                                                (float("nan"), 1.0)])
def test_more_than_is_allowed_has_failed(error, allowed):
    with pytest.raises(AssertionError, match="allowed"):
        record.share(error, allowed)


def test_a_case_without_any_key_is_right_when_it_gives_zeros():
    cases = [kernel_cases.Case(keys=1, queries=5, masked=True, seed=seed) for seed in range(12)]
    hidden = [not case.build()["key_mask"].any() for case in cases]
    assert any(hidden) and not all(hidden)
    rows = kernel_cases.run_group(cases, "cpu", "torch")
    assert [wrong for _, _, wrong in rows] == [""] * len(cases)
    for (_, ratio, _), nothing in zip(rows, hidden, strict=True):
        assert 0 <= ratio <= 1 and (ratio == 0 or not nothing)


def test_a_sanitizer_failure_keeps_its_cause():
    report = [f"========= line {i}" for i in range(40)]
    frames = [f"  frame {i}" + 500 * "." for i in range(90)]
    traceback = ["RuntimeError: an illegal access", *frames]
    kept = sanitize.cause("\n".join(["ran", "========= ", *report, "", *traceback])).splitlines()
    assert kept[:12] == report[:12] and kept[12] == traceback[0]
    assert [line[:10] for line in kept[13:]] == [f"  frame {i}" for i in range(85, 90)]
    assert max(map(len, kept)) <= 200


@pytest.mark.parametrize("text", ["", "killed", "========= a\nan error\n========= b"])
def test_a_short_failure_is_kept_whole(text):
    assert sanitize.cause(text) == text


def test_a_process_that_fails_says_why():
    row = sanitize.child("no such kernel", [], 60)
    assert row["exit"] and "invalid choice: 'no such kernel'" in row["failed"]
