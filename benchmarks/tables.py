"""Write the measured tables of README.md and docs/ out of benchmarks/results/; never by hand.

python benchmarks/tables.py          # rewrite
python benchmarks/tables.py --check  # fail where a page differs from the results
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import method_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/kernels.md", "docs/break-even.md", "docs/tile-sparse.md",
         "docs/batch.md", "docs/bottleneck.md", "docs/static-policies.md",
         "fastdiff/models/tiny-video/README.md")

Row = dict


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]


def quality(result: dict) -> list[str]:
    rows = []
    for row in result["rows"]:
        over = row["psnr_over_random_db"]
        random = row["variant"].startswith("random")
        density = row.get("density_all_calls")
        rows.append([
            row["variant"], str(row["clips"]), "" if density is None else f"{density:.2f}",
            _mean(row["psnr_db"], ".2f"), _mean(row["ssim"], ".4f"),
            _mean(over, "+.2f") if over and not random else "",
        ])
    heads = ["variant", "clips", "density, all steps", "PSNR to stock, dB", "SSIM",
             "PSNR over random tiles, dB"]
    settings = result["settings"]
    what = f"{settings['steps']} steps, guidance {settings['guidance']:g}, mean ± 95 % confidence"
    return [*table(heads, rows), "", _where(result, what)]


def _mean(value: Row, form: str) -> str:
    half = value["ci95"]
    return f"{value['mean']:{form}}" + (f" ± {half:{form.strip('+')}}" if half else "")


def forward(result: dict) -> list[str]:
    rows = [[f"{row['tokens']:,}", row["variant"], f"{row['seconds'] * 1e3:.0f}",
             f"{row['p20'] * 1e3:.0f} to {row['p80'] * 1e3:.0f}", f"{row['speedup']:.2f}x",
             f"{row['relative_error']:.4f}"] for row in result["rows"]]
    heads = ["tokens", "variant", "ms a forward", "p20 to p80", "speed-up", "relative error"]
    return [*table(heads, rows), "", _interleaved(result)]


def denoiser(result: dict) -> list[str]:
    rows = []
    for row in result["rows"]:
        part = f" ({row['layers']} of {row['of_layers']} layers)"
        rows.append([
            row["model"] + ("" if row["layers"] == row["of_layers"] else part), row["variant"],
            f"{row['density']:.3f}", f"{row['seconds']:.3f}", f"{row['speedup']:.2f}x",
            f"{row['peak_memory_gib']:.1f}"])
    heads = ["model", "variant", "density", "s a forward", "speed-up", "peak GiB"]
    return [*table(heads, rows), "", _interleaved(result)]


def kernels(result: dict) -> list[str]:
    """One line a shape: the best dense kernel, then each implementation's time and E."""
    shapes: dict[tuple, list[Row]] = {}
    for row in result["rows"]:
        shapes.setdefault((row["name"], row["heads"], row["tokens"], row["dim"],
                           row["density"]), []).append(row)
    rows = []
    for (name, heads, tokens, dim, density), found in shapes.items():
        dense = min((r for r in found if r["what"].startswith("dense") and "seconds" in r),
                    key=lambda r: r["seconds"])
        cells = [name, f"{heads} x {tokens:,} x {dim}", f"{density:.3f}",
                 f"{dense['seconds'] * 1e3:.2f} ({dense['what'].removeprefix('dense ')})"]
        for impl in ("gluon", "triton", "FlexAttention"):
            row = next((r for r in found if r["what"] in (impl, f"tile-sparse, {impl}")), None)
            cells.append("" if row is None or "seconds" not in row else
                         f"{row['seconds'] * 1e3:.2f}, {row['speedup']:.2f}x, "
                         f"{row['efficiency']:.2f}")
        rows.append(cells)
    heads = ["shape", "heads x tokens x D", "density", "best dense, ms",
             "gluon: ms, speed-up, E", "triton: ms, speed-up, E", "FlexAttention: ms, speed-up, E"]
    return [*table(heads, rows), "", _interleaved(result)]


def kernel_cases(result: dict) -> list[str]:
    rows = [[row["impl"], f"{row['cases']:,}", str(row["failed"]),
             f"{row['worst_error_over_allowed']:.2f}"] for row in result["rows"]]
    return [*table(["implementation", "cases", "failed", "largest error over its bound"], rows),
            "", _where(result, "random sizes, strides, lists, ragged blocks and tails")]


def backward(result: dict) -> list[str]:
    """Times of the backward alone; the error cases in one line below."""
    rows = []
    for row in result["rows"]:
        if row["kind"] != "time" or "failed" in row or "config" in row:
            continue
        spent = row.get("parts", {})
        rows.append([
            f"{row['heads']} x {row['tokens']:,} x {row['head_dim']}", row["what"],
            f"{row['density']:.3f}", "on" if row["tail"] else "",
            f"{row['seconds'] * 1e3:.2f}", f"{row['tflops']:.0f}", f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.2f}",
            *(f"{spent[k] * 1e3:.2f}" if k in spent else "" for k in ("dq", "dkv", "tail", "rest")),
        ])
    heads = ["heads x tokens x D", "what", "density", "tail", "ms", "TFLOP/s", "over best dense",
             "E", "dq, ms", "dk and dv, ms", "means, ms", "rest, ms"]
    cases = [row for row in result["rows"] if row["kind"] == "error"]
    worst = max((max(row["shares"].values()) for row in cases if "shares" in row), default=0.0)
    what = (f"{len(cases)} random cases against float64, {sum('failed' in r for r in cases)} "
            f"failed, largest error {worst:.2f} of its bound; median of "
            f"{result['settings']['rounds']}, interleaved")
    return [*table(heads, rows), "", _where(result, what)]


def finetune(result: dict) -> list[str]:
    rows = [[row["trained"], row["judged"], _mean(row["loss"], ".4f"),
             "" if row["trained"] == "not" else _mean(row["change"], "+.4f"),
             f"{row['run']['step']['seconds']:.2f}" if "run" in row else ""]
            for row in result["rows"]]
    made = result["settings"]
    what = (f"tiny-video, {made['method']} at density {made['density']:g}, {made['steps']} steps "
            f"of {made['batch']} on {made['clips']} clips of {made['frames']} frames; judged on "
            f"{made['unseen']} other clips, change paired, mean ± 95 % confidence")
    return [*table(["trained", "judged", "loss", "change", "s a step"], rows), "",
            _where(result, what)]


def cpu_attention(result: dict) -> list[str]:
    rows = [[f"{row['tokens']:,}", row["blocks"], f"{row['density']:.2f}",
             "on" if row["tail"] else "off", f"{row['dense_seconds'] * 1e3:.0f}",
             f"{row['seconds'] * 1e3:.0f}", f"{row['speedup']:.2f}x"] for row in result["rows"]]
    heads = ["tokens", "blocks", "density", "tail", "dense ms", "ms", "speed-up"]
    return [*table(heads, rows), "", _interleaved(result)]


def ability(result: dict) -> list[str]:
    rows = [[row["kind"], str(row["samples"]), *(
        f"{row[k]:.1%}" if k in row else "" for k in ("object", "colour", "pattern", "direction"))]
        for row in result["rows"]]
    heads = ["", "samples", "object", "background colour", "pattern", "direction"]
    return [*table(heads, rows), "",
            _where(result, "prompts of pairs never seen in training, the model's own settings")]


def batch(result: dict) -> list[str]:
    rows = [[str(row["together"]), f"{row['seconds']:.2f}",
             f"{row['p20']:.2f} to {row['p80']:.2f}", f"{row['gain']:.2f}x",
             f"{row['largest_difference']:.1e}"]
            for row in result["rows"] if row["what"] == "seconds a job"]
    heads = ["jobs in a call", "s a job", "p20 to p80", "gain", "largest difference of a pixel"]
    both = next(row for row in result["rows"] if row["what"] == "overlap")
    overlap = (f"Overlap: {both['jobs']} jobs with {both['denoising']:.1f} s in the pipeline and "
               f"{both['writing']:.1f} s of writing took {both['wall']:.1f} s in all.")
    return [*table(heads, rows), "", f"{overlap} {_job(result)}; {_interleaved(result)}"]


def _job(result: dict) -> str:
    made = result["settings"]
    return (f"A job is {made['frames']} frames of {made['height']} x {made['width']} by "
            f"{made['model']}, {made['steps']} steps, {made['method']}, {made['dtype']}")


def batch_workers(result: dict) -> list[str]:
    rows = [[str(row["workers"]), "one" if row["killed"] else "none", str(row["jobs"]),
             f"{row['jobs_per_second']:.2f}", f"{row['wall']:.0f}",
             ", ".join(map(str, row["by_worker"]))] for row in result["rows"]]
    heads = ["workers", "killed", "jobs", "jobs a second, once loaded", "s in all", "by worker"]
    return [*table(heads, rows), "",
            _where(result, f"{_job(result)}; every job has one result, written once")]


def staged(result: dict) -> list[str]:
    rows = []
    for row in result["rows"]:
        distance = row["kernel_distance"]
        rows.append([
            row["variant"], "" if row["work"] is None else f"{row['work']:.2f}",
            "" if distance is None else f"{distance:.3f}",
            *(_mean(row[name], ".2f") if name in row else "" for name in
              ("object", "colour", "pattern", "direction")),
            f"{1e3 * row['sharpness']['mean']:.1f}",
        ])
    heads = ["run", "work", "kernel distance", "object", "colour", "pattern", "direction",
             "sharpness"]
    made = result["settings"]
    what = (f"{made['model']}, {made['samples']} {made['kind']}s of pairs never seen in training, "
            f"stock has {made['steps']} steps; work is the denoiser's operations over stock's")
    return [*table(heads, rows), "", _where(result, what)]


def staged_loop(result: dict) -> list[str]:
    rows = [[row["case"], row["run"], f"{row['seconds']:.2f}", f"{row['speedup']:.2f}x",
             " + ".join(map(str, row["steps"])), " + ".join(map(str, row["steps_run"])),
             ", ".join(f"{s:.3f}" for s in row["seconds_a_step"])] for row in result["rows"]]
    heads = ["model", "run", "s a loop", "speed-up", "steps", "of them run", "s a step"]
    how = result["settings"].get("how", "whole loops")
    return [*table(heads, rows), "", _where(result, f"random weights, one prompt; {how}")]


def mask_maps(result: dict) -> list[str]:
    rows = [[row["method"], ", ".join(f"{k}={v}" for k, v in row["options"].items()),
             "on" if row["tail"] else "off", f"{row['density']:.2f}",
             f"{row['kept_attention']:.2f}", f"{row['output_error']:.3f}"]
            for row in result["rows"]]
    heads = ["method", "options", "tail", "density", "attention kept", "output error"]
    made = result["settings"]
    what = (f"{made['model']}, grid {' x '.join(map(str, made['grid']))}, step {made['step'] + 1}, "
            f"layer {made['layer'] + 1} of {made['layers']}, one prompt")
    return [*table(heads, rows), "", _where(result, what)]


def by_method(result: dict) -> list[str]:
    heads, rows = method_tables.methods(result)
    return [*table(heads, rows), "", _where(result, method_tables.methods_note(result))]


def by_architecture(result: dict) -> list[str]:
    heads, rows = method_tables.architectures(result)
    return [*table(heads, rows), "", _interleaved(result)]


def _interleaved(result: dict) -> str:
    first = result["rows"][0]
    repeats = first.get("repeats", first.get("rounds"))
    return _where(result, f"median of {repeats}, interleaved")


def _where(result: dict, what: str) -> str:
    device, versions = result["device"], result["versions"]
    name = device if isinstance(device, str) else device["name"]
    if isinstance(device, dict) and device["type"] == "cpu":
        name += f", {device['threads']} threads"
    parts = [what, f"{name}, torch {versions['torch']}", result.get("created", "")[:10],
             f"`benchmarks/results/{result['file']}`"]
    return "; ".join(part for part in parts if part) + "."


TABLES: dict[str, tuple[str, Callable[[dict], list[str]]]] = {
    "quality": ("tiny_video_quality_cuda.json", quality),
    "forward-cpu": ("tiny_video_forward_cpu.json", forward),
    "forward-cuda": ("tiny_video_forward_cuda.json", forward),
    "denoiser": ("denoiser_cuda.json", denoiser),
    "kernels": ("kernels_cuda.json", kernels),
    "kernel-cases": ("kernel_cases_cuda.json", kernel_cases),
    "cpu-attention": ("cpu_attention.json", cpu_attention),
    "batch": ("batch-cpu.json", batch),
    "batch-workers": ("batch-workers-cpu.json", batch_workers),
    "ability": ("tiny_video_ability.json", ability),
    "methods": ("methods_tiny_video_cuda_0.25.json", by_method),
    "architectures": ("architectures_cuda.json", by_architecture),
    "staged": ("staged_tiny-video_picture_cpu.json", staged),
    "staged-clips": ("staged_tiny-video_clip_cuda.json", staged),
    "mask-maps": ("mask_maps.json", mask_maps),
    "backward": ("backward_cuda.json", backward),
    "finetune": ("finetune_cpu_tiny.json", finetune),
    "staged-loop": ("staged_loop_cuda.json", staged_loop),
}


def filled(text: str) -> str:
    """The text with every `<!-- table NAME -->` ... `<!-- end -->` part made anew."""
    for name, (file, make) in TABLES.items():
        begin = f"<!-- table {name} -->"
        if begin not in text:
            continue
        result = {**json.loads((RESULTS / file).read_text()), "file": file}
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition("<!-- end -->")
        text = "\n".join([head + begin, *make(result), "<!-- end -->"]) + tail
    return text


def main() -> int:
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale:
        print("changed:", *stale)
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
