"""Draw quality against time: likeness on the shipped video model, speed on a full-size one.

python benchmarks/quality_time.py          # docs/images/quality-time.png, from benchmarks/results

Across: the speed-up of all denoising steps with the dense first ones, from one forward of the
full-size model in architectures_cuda_DENSITY.json, or in architectures_cuda.json where there is
none at the density of the quality; a note then says so. Up: PSNR to stock on tiny-video.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
import knobs  # noqa: E402
from chart import BLUE, GRAY, GREEN, ORANGE, Chart, Colour, save  # noqa: E402

RESULTS = HERE / "results"
QUALITY = ["methods_tiny_video_cuda_0.25.json", "methods_tiny_video_cuda_0.1.json"]
MODEL = "wan-14b-720p"
# a method that keeps this much more than it was asked to is not comparable
LOOSE = 1.5


@dataclass(frozen=True)
class Mark:
    """A method in the chart. speedup: of all steps; psnr, ci: in dB to stock."""

    name: str
    speedup: float
    psnr: float
    ci: float
    colour: Colour
    hollow: bool = False


def all_steps(forward: float, dense_steps: float) -> float:
    """Speed-up of steps of which the first are dense, from that of a sparse forward."""
    return 1 / (dense_steps + (1 - dense_steps) / forward)


def marks(quality: dict[str, Any], times: list[dict[str, Any]]) -> tuple[list[Mark], list[str]]:
    """What can be drawn, and the methods that cannot, with the reason."""
    found, left_out = [], []
    timed = {row["variant"]: row for row in times}
    for row in quality["rows"]:
        name, time = row["variant"], timed.get(row["variant"])
        if "density_sparse_steps" not in row:
            continue
        if time is None or "failed" in time:
            left_out.append(f"{name} (not timed)")
        elif time["density"] > LOOSE * time["asked_density"]:
            left_out.append(f"{name} (keeps {time['density']:.0%} on random weights)")
        else:
            colour = ORANGE if name == knobs.OURS else GRAY if row["control"] else BLUE
            label = f"{name} ({row['control']})" if row["control"] else name
            found.append(Mark(label, all_steps(time["speedup"], row["dense_steps"]),
                              row["psnr"]["mean"], row["psnr"]["ci95"] or 0.0, colour,
                              bool(row["control"])))
    return found, left_out


def fewer_steps(results: list[dict[str, Any]]) -> list[Mark]:
    """Stock with fewer steps, from every file that has such a row, by speed."""
    found = {}
    for result in results:
        steps = result["settings"]["call"]["num_inference_steps"]
        for row in result["rows"]:
            fewer = row.get("num_inference_steps")
            if fewer is not None:
                found[fewer] = Mark(row["variant"], steps / fewer, row["psnr"]["mean"],
                                    row["psnr"]["ci95"] or 0.0, GREEN, True)
    return sorted(found.values(), key=lambda mark: mark.speedup)


def drawn(results: list[dict[str, Any]], timing: dict[str, Any], model: str) -> Chart:
    times = [row for row in timing["rows"] if row["model"] == model]
    if not times:
        known = ", ".join(dict.fromkeys(row["model"] for row in timing["rows"]))
        raise ValueError(f"no rows of {model!r} in the timing file; it has {known}")
    quality = results[0]
    found, left_out = marks(quality, times)
    steps = fewer_steps(results)
    every = [*found, *steps]
    low = int(min(m.psnr - m.ci for m in every)) - 1
    high = int(max(m.psnr + m.ci for m in every)) + 1
    least = int(10 * min(1.0, *(m.speedup for m in every))) / 10 - 0.05
    most = int(10 * max(m.speedup for m in every)) / 10 + 0.35
    chart = Chart((760, 500), (least, most), (low, high), notes(quality, timing, left_out))
    ticks = [least + 0.05 + 0.2 * i for i in range(int((most - least) / 0.2) + 1)]
    dense = next(row["dense_steps"] for row in quality["rows"] if "dense_steps" in row)
    chart.axes(
        "Quality against time, by attention method",
        f"speed-up of all steps of {times[0]['title'].partition(':')[0]} at density "
        f"{timing['settings']['density']:g}, first {dense:.0%} of the steps dense",
        f"PSNR to stock, dB, {quality['settings']['model']} at density "
        f"{quality['settings']['density']:g}",
        [(t, f"{t:.1f}x") for t in ticks if t <= most], [(y, str(y)) for y in range(low, high, 2)])
    chart.line([(m.speedup, m.psnr) for m in steps], GREEN, 1)
    for mark in every:
        chart.line([(mark.speedup, mark.psnr - mark.ci), (mark.speedup, mark.psnr + mark.ci)],
                   mark.colour, 1.2)
        chart.keep_clear((mark.speedup - 0.004, mark.psnr - mark.ci),
                         (mark.speedup + 0.004, mark.psnr + mark.ci))
        chart.point(mark.speedup, mark.psnr, mark.colour, 4.5, mark.hollow)
    for mark in every:
        chart.label(mark.speedup, mark.psnr, mark.name, mark.colour)
    return chart


def notes(quality: dict[str, Any], timing: dict[str, Any], left_out: list[str]) -> list[str]:
    """What a reader has to know besides the axes."""
    floor = next((row for row in quality["rows"] if row["variant"] == "stock, other kernel"), None)
    found = ["bars: 95 % confidence; hollow: controls"]
    if floor is not None:
        found[0] += f"; noise floor, stock with another kernel: {floor['psnr']['mean']:.1f} dB"
    if left_out:
        found.append(f"not drawn: {', '.join(left_out)}")
    if timing["settings"]["density"] != quality["settings"]["density"]:
        found.append(f"mind: times are at density {timing['settings']['density']:g}, quality at "
                     f"{quality['settings']['density']:g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, nargs="+", default=[RESULTS / n for n in QUALITY],
                        help="files of methods.py; the first is drawn, all give fewer steps")
    parser.add_argument("--time", type=Path, help="file of architectures.py")
    parser.add_argument("--model", default=MODEL, help="row of the timing file")
    parser.add_argument("-o", "--output", type=Path, default=HERE.parent / "docs/images")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.quality]
    time = args.time
    if time is None:
        same = RESULTS / f"architectures_cuda_{results[0]['settings']['density']:g}.json"
        time = same if same.is_file() else RESULTS / "architectures_cuda.json"
    chart = drawn(results, json.loads(time.read_text()), args.model)
    save([chart], args.output / "quality-time.png")


if __name__ == "__main__":
    main()
