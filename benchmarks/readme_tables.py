"""Write the measured tables of README.md out of benchmarks/results/; never by hand.

python benchmarks/readme_tables.py          # rewrite
python benchmarks/readme_tables.py --check  # fail where README.md differs from the results
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def quality(result: dict) -> list[str]:
    lines = ["| variant | density, all calls | PSNR to stock, dB | SSIM | over random tiles, dB |",
             "| --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        if row["variant"] == "stock":
            continue
        over = row["psnr_over_random_db"]
        shown = (f"{over['mean']:+.2f} ± {over['ci95']:.2f}"
                 if over and not row["variant"].startswith("random") else "")
        density = row.get("density_all_calls")
        lines.append(
            f"| {row['variant']} | {'' if density is None else f'{density:.2f}'} | "
            f"{row['psnr_db']['mean']:.2f} ± {row['psnr_db']['ci95']:.2f} | "
            f"{row['ssim']['mean']:.4f} | {shown} |")
    clips = result["rows"][0]["clips"]
    return [*lines, "", _where(result, f"{clips} clips, mean ± 95 % confidence")]


def forward(result: dict) -> list[str]:
    lines = ["| tokens | variant | ms | p20 to p80 | speed-up | relative error |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        lines.append(
            f"| {row['tokens']:,} | {row['variant']} | {row['seconds'] * 1e3:.1f} | "
            f"{row['p20'] * 1e3:.1f} to {row['p80'] * 1e3:.1f} | {row['speedup']:.2f}x | "
            f"{row['relative_error']:.4f} |")
    return [*lines, "", _where(result, f"median of {result['rows'][0]['repeats']}, interleaved")]


def denoiser(result: dict) -> list[str]:
    lines = ["| model, random weights | variant | density | s a forward | speed-up | peak GiB |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        model = row["model"]
        if row["layers"] != row["of_layers"]:
            model += f" ({row['layers']} of {row['of_layers']} layers)"
        lines.append(
            f"| {model} | {row['variant']} | {row['density']:.3f} | {row['seconds']:.3f} | "
            f"{row['speedup']:.2f}x | {row['peak_memory_gib']:.1f} |")
    return [*lines, "", _where(result, f"median of {result['rows'][0]['repeats']}, interleaved")]


def _where(result: dict, what: str) -> str:
    device, versions = result["device"], result["versions"]
    return (f"{what}; {device['name']}, torch {versions['torch']}, {result['created'][:10]}; "
            f"`benchmarks/results/{result['file']}`")


TABLES: dict[str, tuple[str, Callable[[dict], list[str]]]] = {
    "quality": ("tiny_video_quality_cuda.json", quality),
    "forward-cpu": ("tiny_video_forward_cpu.json", forward),
    "forward-cuda": ("tiny_video_forward_cuda.json", forward),
    "denoiser": ("denoiser_cuda.json", denoiser),
}


def filled(text: str) -> str:
    """The text with every `<!-- table NAME -->` ... `<!-- end -->` part made anew."""
    for name, (file, make) in TABLES.items():
        begin = f"<!-- table {name} -->"
        if begin not in text:
            continue
        path = RESULTS / file
        result = {**json.loads(path.read_text()), "file": file}
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition("<!-- end -->")
        text = "\n".join([head + begin, *make(result), "<!-- end -->"]) + tail
    return text


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    new = filled(text)
    if "--check" in sys.argv:
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
