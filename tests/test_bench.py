"""The measuring scripts: figures are what they say, a run goes on, every method is a row."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from skimage.metrics import structural_similarity
from typer.testing import CliRunner

from fastdiff.cli import app, bench
from fastdiff.policies import methods as registered

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
architectures, clips, dense_kernels, denoisers, knobs, likeness, measured, record = (
    bench.script(name) for name in ("architectures", "clips", "dense_kernels", "denoisers", "knobs",
                                    "likeness", "methods", "record"))
forward_time = bench.script("forward_time")


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "wan"
    zoo.build("wan").save_pretrained(folder)
    (folder / "fastdiff.json").write_text(json.dumps({
        "kind": ["video", "image"], "height": 96, "width": 96, "frames": 9, "fps": 8, "steps": 3,
        "guidance": 4.0, "max_sequence_length": zoo.TEXT, "multiple": 16, "frames_rule": "4n+1"}))
    return str(folder)


def run(*words: Any, code: int = 0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


# likeness


def test_psnr_and_ssim_are_the_usual_ones():
    torch.manual_seed(0)
    one = torch.rand(2, 3, 3, 40, 48)
    two = (one + 0.1 * torch.randn_like(one)).clamp(0, 1)
    psnr, ssim = likeness.similarity(two, one)
    for i in range(2):
        error = float((two[i] - one[i]).square().mean())
        assert psnr[i] == pytest.approx(-10 * torch.tensor(error).log10().item(), abs=1e-4)
        frames: list[Any] = [structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False) for a, b in zip(two[i], one[i], strict=True)]
        assert ssim[i] == pytest.approx(sum(frames) / 3, abs=2e-3)


def test_features_are_zero_for_equal_and_grow_with_the_difference():
    torch.manual_seed(0)
    one = torch.rand(1, 2, 3, 64, 64)
    noise = torch.randn_like(one)
    found = [likeness.features((one + s * noise).clamp(0, 1), one)[0] for s in (0.0, 0.05, 0.3)]
    assert found[0] == 0 and 0 < found[1] < found[2]


def test_means_have_their_confidence_and_pairs_their_difference():
    assert likeness.mean_ci([1.0, 2.0, 3.0]) == {"mean": 2.0, "ci95": pytest.approx(1.13161)}
    assert likeness.mean_ci([1.0])["ci95"] is None
    one = {"a": {"psnr": 30.0}, "b": {"psnr": 20.0}, "c": {"psnr": 1.0}}
    two = {"a": {"psnr": 28.0}, "b": {"psnr": 19.0}}
    assert likeness.paired(one, two, "psnr")["mean"] == 1.5
    assert likeness.paired(one, {}, "psnr") is None


def test_a_spread_is_the_median_and_the_fifths_beside_it():
    assert record.spread([9.0, 2.0, 1.0, 100.0, 3.0, 4.0]) == {
        "seconds": 3.5, "p20": 2.0, "p80": 9.0, "repeats": 6}
    assert record.spread([2.0]) == {"seconds": 2.0, "p20": 2.0, "p80": 2.0, "repeats": 1}


def test_a_result_names_the_weights_it_was_measured_on(tmp_path):
    from fastdiff import models

    for name, known in (("tiny-unet", {"sha256": models.find("tiny-unet").sha256}), ("else", {})):
        record.write(tmp_path / "a.json", "a", "cpu", {"model": name}, [])
        assert json.loads((tmp_path / "a.json").read_text())["settings"] == {"model": name, **known}


def test_prompts_are_thirty_two_and_none_is_used_in_a_search():
    from fastdiff.calibration.prompts import DEFAULT

    assert len({*clips.PROMPTS}) == 32 and not {*clips.PROMPTS} & {*DEFAULT}


# every method


def test_every_registered_attention_method_is_a_row():
    assert {*knobs.names()} == {*registered()} and knobs.names()[0] == "tile-sparse"
    for name in knobs.names():
        method = knobs.method(name, 0.3)
        assert method.density == 0.3 and method.min_tokens == 1 and method.max_density == 1.0
    with pytest.raises(ValueError, match="accepted are"):
        knobs.names(["nothing"])


@pytest.mark.parametrize("speedup, share, found", [
    (2.0, None, (12, 0.6)), (0.9, None, None), (0.9, 0.5, (10, 0.5)), (1e9, 0.01, (1, 0.01)),
])
def test_fewer_steps_get_the_time_of_our_method(speedup, share, found):
    args = argparse.Namespace(share=share, dense_steps=0.2, steps=20)
    steps = measured.fewer_steps(args, [{"variant": "tile-sparse", "speedup": speedup}])
    assert steps == (None if found is None else (found[0], pytest.approx(found[1])))


def test_a_bench_has_every_figure_and_goes_on_where_it_was(wan, tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    words = ["--model", wan, "--methods", "tile-sparse", "random-blocks", "--prompts", "2",
             "--seeds", "0", "1", "--batch", "2", "--repeats", "2", "--density", "0.4", "--share",
             "0.6", "-o", str(out), "--work", str(tmp_path / "work")]
    made: list[str] = []
    make = clips.Maker.make

    def counted(self, prompts, seeds, method, **changes):
        made.append("stock" if method is None else method.name)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make(self, prompts, seeds, method, **changes)

    monkeypatch.setattr(clips.Maker, "make", counted)
    with pytest.raises(KeyboardInterrupt):
        measured.main(words, tell=lambda what: None)
    told: list[Any] = []
    measured.main(words, tell=told.append)
    whole = json.loads(out.read_text())
    # seed 0: two rows were finished; what was left there and all of seed 1 were made
    assert len(made) == 4 + 3 + 5
    rows = {row["variant"]: row for row in whole["rows"]}
    assert [*rows] == ["stock, other kernel", "tile-sparse", "random-blocks", "stock, 2 steps"]
    ours = rows["tile-sparse"]
    assert ours["clips"] == 4 and len(ours["psnr_each"]) == 4
    assert ours["dense_steps"] == pytest.approx(1 / 3)
    every = ours["dense_steps"] + (1 - ours["dense_steps"]) * ours["density_sparse_steps"]
    assert ours["density_all_steps"] == pytest.approx(every)
    assert 0.3 < ours["density_sparse_steps"] < 0.6 < ours["operations_all_steps"]
    assert rows["random-blocks"]["psnr_over_tile-sparse"]["ci95"] > 0
    assert rows["stock, other kernel"]["psnr"]["mean"] > 60
    forward = ours["forward"]
    assert forward["p20"] <= forward["seconds"] <= forward["p80"] and forward["repeats"] == 2
    assert whole["settings"]["fewer_steps"]["steps"] == 2 and whole["device"]["type"] == "cpu"
    assert len(told) == 1 and told[0].row_count == 4
    monkeypatch.setattr(clips.Maker, "make", make)
    before = json.loads(out.read_text())["rows"]
    measured.main(words, tell=lambda what: None)
    again = json.loads(out.read_text())["rows"]
    assert [r["psnr_each"] for r in again] == [r["psnr_each"] for r in before]


def test_the_command_runs_it(wan, tmp_path):
    out = tmp_path / "r.json"
    run("bench", "methods", "-m", wan, "--method", "tile-sparse", "--prompts", 1, "--seed", 0,
        "--repeats", 1, "--density", 0.4, "-o", out, "--restart")
    assert {row["variant"] for row in json.loads(out.read_text())["rows"]} >= {"tile-sparse"}
    assert "unknown method" in run("bench", "methods", "-m", wan, "--method", "no", code=2).stderr


def test_outside_a_checkout_the_command_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fastdiff" / "cli" / "bench.py"))
    result = run("bench", "methods", "--tiny", code=2)
    assert "source checkout" in result.stderr and "Traceback" not in result.stderr


def test_options_become_words():
    found = bench.words_of(model="m", methods=["a", "b"], tiny=True, restart=False, share=None,
                           dense_steps=0.2, seeds=[])
    assert found == ["--model", "m", "--methods", "a", "b", "--tiny", "--dense-steps", "0.2"]


# architectures


@pytest.mark.parametrize("name", sorted(denoisers.ARCHITECTURES))
def test_an_architecture_runs_every_method_and_writes_rows(name, tmp_path):
    out = tmp_path / "a.json"
    words = ["--tiny", "--models", name, "--methods", "tile-sparse", "sparse-vdit", "--density",
             "0.3", "--option", "dense_steps=0.1", "-o", str(out)]
    architectures.main(words)
    result = json.loads(out.read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"dense default", "dense math", architectures.SEAM, "tile-sparse"} <= {*rows}
    ours = rows["tile-sparse"]
    assert "failed" not in ours and ours["sparse_calls"] == 2 and 0 < ours["density"] < 1
    assert ours["density_all_steps"] == pytest.approx(0.1 + 0.9 * ours["density"])
    assert len(ours["layer_seconds"]) == 2 and rows[architectures.SEAM]["density"] == 1
    assert rows["dense default"]["speedup"] <= 1 and ours["best_dense"].startswith("dense ")
    assert rows[architectures.SEAM]["relative_error"] < 1e-5


def test_rows_of_other_models_stay_in_the_file(tmp_path):
    out = tmp_path / "a.json"
    for name in ("flux-2k", "wan-1.3b-480p", "flux-2k"):
        architectures.main(["--tiny", "--models", name, "--methods", "random-blocks", "-o",
                            str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows].count("flux-2k") == len(rows) // 2


def test_a_method_that_cannot_run_is_a_row_that_says_why(tmp_path, monkeypatch):
    from fastdiff.policies.random_blocks import RandomBlocks

    def broken(*args: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(RandomBlocks, "select", broken)
    out = tmp_path / "a.json"
    architectures.main(["--tiny", "--models", "flux-2k", "--methods", "random-blocks",
                        "tile-sparse", "-o", str(out)])
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["random-blocks"]["failed"] == "RuntimeError: no such kernel"
    assert rows["tile-sparse"]["seconds"] > 0


def test_a_dense_kernel_is_put_back_and_equals_stock():
    import torch.nn.functional as F

    stock = F.scaled_dot_product_attention
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    wanted = stock(q, k, v)
    for name in dense_kernels.kernels("cpu"):
        with dense_kernels.dense_kernel(name):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), wanted)
        assert F.scaled_dot_product_attention is stock
