"""Pages and pictures of measurements: tables out of files, charts, contact sheets, maps."""

import json

import pytest
import torch
from PIL import Image, ImageSequence

from fastdiff.cli import bench
from fastdiff.layout import TokenLayout

attention_mass, chart, gallery, kernel_tables, method_tables, model_tables, quality_time = (
    bench.script(name) for name in ("attention_mass", "chart", "gallery", "kernel_tables",
                                    "method_tables", "model_tables", "quality_time"))
sheets, tables, token_operations, token_tables = (
    bench.script(name) for name in ("sheets", "tables", "token_operations", "token_tables"))

# tables


def page(name: str, inside: str = "as it was") -> str:
    return f"before\n<!-- table {name} -->\n{inside}\n<!-- end -->\nafter\n"


def result(rows: list[dict], **settings: object) -> dict:
    return {"rows": rows, "settings": settings, "device": {"type": "cuda", "name": "a GPU"},
            "versions": {"torch": "2"}, "created": "2026-01-01T00:00:00"}


ABILITY = {"kind": "clips", "size": 256, "samples": 8, "object": 1.0, "colour": 0.5}


def test_a_part_without_a_result_file_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.filled(page("ability")) == page("ability")
    (tmp_path / "tiny_video_ability.json").write_text(json.dumps(result([ABILITY])))
    made = tables.filled(page("ability"))
    assert "| clips | 256 x 256 | 8 | 100.0% | 50.0% |" in made
    assert made.startswith("before\n") and made.endswith("<!-- end -->\nafter\n")
    assert tables.filled(made) == made


def test_every_table_of_a_page_is_known():
    for name in tables.PAGES:
        text = (tables.ROOT / name).read_text()
        for part in text.split("<!-- table ")[1:]:
            assert part.partition(" -->")[0] in tables.TABLES, name


def test_the_columns_of_an_ability_table_are_those_of_its_rows():
    heads, rows = model_tables.ability(result([ABILITY]))
    assert heads == ["", "pixels", "samples", "object", "background colour"]
    larger = {**ABILITY, "size": 512, "place": 0.25, "placed": 4}
    heads, rows = model_tables.ability(result([ABILITY, larger]))
    assert heads[-1] == "asked place"
    assert [row[-1] for row in rows] == ["", "25.0% of 4"]
    assert all(len(row) == len(heads) for row in rows)


def test_steps_and_seconds_of_the_shipped_tiny_image_are_those_of_its_curve():
    """The file was put together by hand, and this is all of it that the repository can prove."""
    curve = tables.ROOT / "training/curves/tiny-image.jsonl"
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    found = json.loads((tables.RESULTS / "tiny_image_training.json").read_text())
    row = next(row for row in found["rows"] if row["run"] == "the shipped one")
    for stage in ("small", "full"):
        told = [line for line in lines if line["stage"] == stage]
        # a check in between begins the count of steps anew
        steps = [line["steps"] for line in told if "steps" in line]
        ends = [n for n, after in zip(steps, [*steps[1:], 0], strict=True) if after < n]
        assert row["steps"][stage] == sum(ends)
        seconds = told[-1]["spent"]
        assert row["seconds"][stage] == pytest.approx(seconds, abs=0.05)
        assert row["steps_a_second"][stage] == pytest.approx(sum(ends) / seconds, abs=0.05)


def test_a_newer_file_stands_for_the_rows_that_both_have():
    def timed(seconds: float, edge: int) -> dict:
        return {"model": "m", "edge": edge, "dtype": "torch.float16", "variant": "stock",
                "seconds": seconds, "p20": 0.0, "p80": 1.0, "speedup": 1.0, "against": "stock"}

    old, new = result([timed(0.1, 1024), timed(0.2, 2048)]), result([timed(0.15, 2048)])
    _, rows = token_tables.times(new, old)
    assert [(row[0], row[2]) for row in rows] == [
        ("m, 1024 px, float16", "100"), ("m, 2048 px, float16", "150")]


def test_kernels_are_compared_with_the_fastest_dense_one():
    def timed(what: str, seconds: float, extra: int, **more: float) -> dict:
        return {"name": "a", "heads": 1, "tokens": 64, "dim": 8, "density": 0.125, "what": what,
                "seconds": seconds, "given_bytes": 300, "bytes": extra, **more}

    dense = [timed("dense flash", 2e-3, 500), timed("dense cudnn", 1e-3, 100)]
    ours = timed("gluon", 5e-4, 110, speedup=2.0, efficiency=0.5)
    _, (row,) = kernel_tables.kernels(result([*dense, ours]))
    assert row[3:] == ["1.00 (cudnn)", "0.50, 2.00x, 0.50", "", "", "+2.5%"]
    without = {**timed("triton", 9e-4, 0, speedup=1.1, efficiency=0.1), "density": 0.1249}
    _, (row,) = kernel_tables.kernels(result([*dense, without]))
    assert row[3:] == ["1.00 (cudnn)", "", "0.90, 1.10x, 0.10", "", ""]


def test_operations_bound_the_gain_of_fewer_tokens():
    row = token_operations.count(128, tiny=True)
    assert 1 < row["at_edm"] < row["both"]
    assert 1 < row["kv_downsample"] < row["both"]


def over(mean: float, ci: float, **row: object) -> dict:
    return {"psnr": {"mean": 30 + mean, "ci95": 1.0}, "control": "",
            "psnr_over_tile-sparse": {"mean": mean, "ci95": ci}, **row}


def test_a_reading_says_ahead_only_outside_the_interval():
    ours = {"variant": "tile-sparse", "clips": 8, "psnr": {"mean": 30.0, "ci95": 1.0},
            "control": "", "options": {"select_by": "top-k", "tail": True}}
    rows = [ours, over(-3, 1, variant="worse"), over(0.5, 1, variant="same"),
            over(2, 1, variant="better", density_sparse_steps=0.2)]
    lines = method_tables.reading(result(rows, density=0.1, fewer_steps=None))
    assert lines[2:] == ["- `tile-sparse` is ahead of: worse by 3.00 ± 1.00 dB.",
                         "- `tile-sparse` is behind: better (keeps 0.200) by 2.00 ± 1.00 dB.",
                         "- `tile-sparse` is not told apart from: same (+0.50 ± 1.00 dB)."]


# charts


def test_labels_do_not_overlap_and_say_when_there_is_no_room():
    made = chart.Chart((400, 300), (0, 1), (0, 1))
    for _ in range(6):
        made.point(0.5, 0.5, chart.BLUE)
    for i in range(6):
        made.label(0.5, 0.5, f"method {i}")
    boxes = made._taken[6:]
    for i, (a, b, c, d) in enumerate(boxes):
        assert made.left < a and c < made.right and made.top < b and d < made.bottom
        assert not any(a < g and e < c and b < h and f < d for e, f, g, h in boxes[:i])
    with pytest.raises(ValueError, match="no free place"):
        for _ in range(200):
            made.label(0.5, 0.5, "one more")


def test_all_steps_count_the_dense_ones():
    assert quality_time.all_steps(2.0, 0.2) == pytest.approx(1 / 0.6)
    assert quality_time.all_steps(1.0, 0.2) == pytest.approx(1.0)


def test_a_method_that_keeps_much_more_than_asked_is_not_drawn():
    rows = [{"variant": "top-p", "density_sparse_steps": 0.25, "dense_steps": 0.2, "control": "",
             "psnr": {"mean": 28.0, "ci95": 1.0}}]
    time = {"variant": "top-p", "density": 0.9, "asked_density": 0.25, "speedup": 1.0}
    found, left_out = quality_time.marks(result(rows), [time])
    assert not found and left_out == ["top-p (keeps 90% on random weights)"]
    found, left_out = quality_time.marks(result(rows), [{**time, "density": 0.25}])
    assert [mark.name for mark in found] == ["top-p"] and not left_out


# contact sheets


def test_an_animation_stays_within_its_limit_or_is_refused(tmp_path):
    torch.manual_seed(0)
    frames = sheets.tiles(torch.rand(4, 3, 48, 48), 48)
    path = tmp_path / "a.gif"
    full = sheets.save_gif(frames, path, 100, 1_000_000)
    assert full == sheets.SHADES[0]
    assert len(list(ImageSequence.Iterator(Image.open(path)))) == 4
    size = path.stat().st_size
    assert sheets.save_gif(frames, path, 100, size - 1) < full
    assert path.stat().st_size < size
    with pytest.raises(ValueError, match="smaller tiles"):
        sheets.save_gif(frames, path, 100, 1000)


def test_a_call_is_told_as_a_user_would_write_it():
    assert gallery.called("balanced", {"min_tokens": 1}) == "enable_fastdiff(min_tokens=1)"
    assert gallery.called("quality", {"tile": (1, 4, 4)}) == \
        "enable_fastdiff('quality', tile=(1, 4, 4))"


# attention mass


@pytest.mark.parametrize("layout", [TokenLayout((3, 6, 10), 5, 2), TokenLayout((2, 5, 7))])
def test_mass_of_tiles_is_that_of_the_whole_map(layout):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, layout.tokens, 2, 8)
    mass = attention_mass.mass_of(q, k, layout)
    whole = (q[0].transpose(0, 1) @ k[0].permute(1, 2, 0) * 8**-0.5).softmax(-1)
    grid = slice(layout.before, layout.before + layout.grid_tokens)
    text = 1 - whole[:, grid, grid].sum(-1).mean(-1)
    torch.testing.assert_close(mass.text, text, atol=1e-5, rtol=0)
    # the mean over query tiles, weighted by their length, is the mean over queries
    cut = attention_mass.even_blocks(TokenLayout(layout.grid), 64, 0, torch.device("cpu"))
    rows = (mass.tiles.sum(-1) * cut.lengths).sum(-1) / cut.lengths.sum()
    torch.testing.assert_close(rows, 1 - text, atol=1e-5, rtol=0)


def test_the_share_of_the_best_tiles_counts_parts():
    tiles = torch.tensor([[[0.1, 0.6, 0.2, 0.1]]])
    mass = attention_mass.Mass(tiles, torch.zeros(1))
    for share, held in ((0.25, 0.6), (0.5, 0.8), (0.125, 0.3), (0.375, 0.7), (1.0, 1.0)):
        assert float(mass.share(share)) == pytest.approx(held)
