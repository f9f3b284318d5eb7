"""What benchmarks/staged.py compares: budgets met to the step, the same samples for every row."""

# scripts of benchmarks/ are imported by their place
# pyright: basic, reportMissingImports=false

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import staged  # noqa: E402
import staged_gpu  # noqa: E402
from staged_judge import Bench, kernel_distance, scales_of  # noqa: E402
from staged_rows import Row, Stages, fit, grid, rows  # noqa: E402

from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage  # noqa: E402

COSTS = {1.0: 1.0, 0.5: 0.27, 0.75: 0.58}


@pytest.mark.parametrize("steps", [16, 20, 28, 50])
@pytest.mark.parametrize("budget", [1.5, 2.0, 3.0])
def test_stages_meet_their_budget(steps, budget):
    for more in ({}, {"first_share": 0.0}, {"scale": 0.75}, {"low_share": 0.8}):
        stages = fit(steps, budget, COSTS, **more)
        # to the nearest low step
        assert abs(stages.work(COSTS) - steps / budget) <= 0.5 * COSTS[stages.scale] + 1e-9
        method = BottleneckSampling(**stages.options)
        done = sum(stage.count(steps) * COSTS[stage.scale] for stage in method.chosen.stages)
        assert done == pytest.approx(stages.work(COSTS))


def test_stages_in_words():
    assert Stages(3, 8, 5).options == {"stages": "1:3, 0.5:8:0.9, 1:5:0.75",
                                       "transition": "continue"}
    found = BottleneckSampling(**Stages(0, 6, 4, last=0.8).options).chosen.stages
    assert found == (Stage(0.5, 6), Stage(1.0, 4, 0.8))


def test_rows_pair_stages_with_fewer_steps():
    found = {row.name: row for row in rows(20, COSTS, [1.5, 2.0, 3.0])}
    assert {f"{n} of 20 steps" for n in (13, 10, 7)} <= {*found}
    for budget in ("1.5x", "2x", "3x"):
        for way in ("restart", "continue", "matched-noise", "low to high, continue"):
            assert f"{budget} {way}" in found
    for row in found.values():
        if row.options is not None:
            BottleneckSampling(**row.options)
    assert scales_of([*found.values()]) == {1.0, 0.5}
    assert "2x tuned" in {row.name for row in rows(20, COSTS, [2.0], {
        "budget": 2.0, "options": {"stages": "0.5:4, 1:4:0.8"}})}


def test_every_candidate_of_the_grid_runs_within_the_budget():
    found = grid(20, COSTS, 2.0, 10**6)
    assert len(found) > 100 and len({row.name for row in found}) == len(found)
    for row in found:
        assert row.options is not None
        stages = BottleneckSampling(**row.options).chosen.stages
        assert sum(s.count(20) * COSTS[s.scale] for s in stages) <= 10 * 1.06
    assert grid(20, COSTS, 2.0, 8) == grid(20, COSTS, 2.0, 8) and len(grid(20, COSTS, 2.0, 8)) == 8


class _Made:
    """A bench whose samples are likely as their row's name says; counts what is made."""

    steps = 20

    def __init__(self):
        self.made = []

    def samples(self, samples, row):
        self.made.append((row.name, samples))
        value = 0.0 if row.name == "renders" else float(row.name)
        return [{"seconds": 1.0, "object": 1, "likelihood": value,
                 "features": torch.randn(8, generator=torch.Generator().manual_seed(i)).tolist()}
                for i in samples]

    def renders(self, samples):
        return self.samples(samples, Row("renders"))

    def work(self, row, costs):
        return 0.5


def test_tuning_finds_the_best_row_on_growing_sets(tmp_path):
    bench = _Made()
    candidates = [Row(str(-n / 10), options={}) for n in range(16)]
    store = staged.Store(bench, tmp_path, 4, 1e9)
    ranked = staged.tune(store, candidates[::-1])
    assert ranked[0][1].name == "0.0" and ranked[0][0] == pytest.approx(0, abs=1e-4)
    count = {row.name: sum(name == row.name for name, _ in bench.made) for row in candidates}
    assert sorted(count.values()) == [1] * 12 + [2] * 2 + [4] * 2
    # nothing is made twice
    before = len(bench.made)
    assert staged.tune(store, candidates[::-1])[0][1].name == "0.0" and len(bench.made) == before


def test_a_comparison_that_is_stopped_keeps_whole_batches(tmp_path):
    bench = _Made()
    wanted = [Row("-1"), Row("-2", steps=10), Row("-0.5", options={})]
    store = staged.Store(bench, tmp_path, 4, 1e9)
    stock = bench.samples

    def stop(samples, row):
        if (row.name, samples.start) == ("-2", 8):
            store.deadline = 0.0
        return stock(samples, row)

    bench.samples = stop
    made = staged.compare(store, wanted, range(0, 16))
    assert {len(samples) for samples in made.values()} == {8}
    found = {row["variant"]: row for row in staged.summary(bench, wanted, made, COSTS)}
    assert found["-0.5"]["likelihood_over"] == {"run": "-2", "mean": 1.5, "ci95": 0.0}
    assert "likelihood_over" not in found["-1"] and found["-1"]["work"] == 0.5
    assert staged.verdict([*found.values()]).endswith(": -0.5")
    store.deadline = 1e18
    assert {len(x) for x in staged.compare(store, wanted, range(0, 16)).values()} == {16}


def test_kernel_distance_is_zero_for_equal_sets_and_grows():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(400, 8, generator=generator) for _ in range(2))
    near, far = kernel_distance(one, two), kernel_distance(one + 1, two)
    assert abs(near) < 0.1 < far
    two[:, 0] = 0  # a feature that never varies is not divided by nothing
    assert kernel_distance(one, two) < 50


def test_work_counts_the_steps_of_every_size():
    bench = SimpleNamespace(steps=20)
    staged_row = Row("stages", options={"stages": "1:2, 0.5:10:0.9, 1:4:0.8"})
    assert Bench.work(bench, staged_row, COSTS) == pytest.approx((6 + 10 * 0.27) / 20)
    assert Bench.work(bench, Row("fewer", steps=10), COSTS) == 0.5
    preset = Row("preset", options={"preset": "balanced"})
    assert Bench.work(bench, preset, COSTS) == pytest.approx((3 + 5 + 6 * 0.27) / 20)


def test_sizes_of_timed_steps_are_those_of_the_stages():
    case = staged_gpu.CASES["hunyuan-720p"]
    assert case.at(0.5, tiny=False) == {"height": 352, "width": 640, "num_frames": 129}
    machine = staged_gpu.Machine(*case.build(True, "cpu"), "cpu", True, 1)
    machine.pipe.set_progress_bar_config(disable=True)
    run = {"video": case.runs["video"]}
    row, = staged_gpu.summed(machine, case, run)
    told, = staged_gpu.whole(machine, case, run)
    for size, number in zip(row["sizes"], (1, 2, 3), strict=True):
        stage = told["report"]["bottleneck"][f"stage {number}"]
        assert stage.startswith(f"{size[0]}x{size[1]}, {row['steps'][number - 1]} steps")
    assert row["seconds"] == pytest.approx(
        sum(n * s for n, s in zip(row["steps"], row["seconds_a_step"], strict=True)), rel=0.01)
