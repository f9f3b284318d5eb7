"""Write the measured tables of README.md and docs/ out of benchmarks/results/; never by hand.

python benchmarks/tables.py          # rewrite
python benchmarks/tables.py --check  # fail where a page differs from the results
python benchmarks/tables.py docs/kernels.md   # these pages only
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import freeswim_tables
import kernel_tables
import method_tables
import model_tables
import staged_tables
import token_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/kernels.md", "docs/break-even.md", "docs/tile-sparse.md",
         "docs/batch.md", "docs/bottleneck.md", "docs/freeswim.md", "docs/tokens.md",
         "docs/static-policies.md", "docs/cli.md",
         "docs/comparison.md", "docs/gallery.md", "docs/attention-mass.md", "docs/training.md",
         *(f"fastdiff/models/tiny-{name}/README.md" for name in ("image", "unet", "video")))

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


def _told(make: Callable[..., tuple[list[str], list[list[str]]]],
          note: Callable[[dict], str]) -> Callable[..., list[str]]:
    """A table of heads and rows, and a line for each result that says what of."""
    return lambda *results: [*table(*make(*results)), "",
                             *(_where(result, note(result)) for result in results)]


def _rounds(result: dict) -> str:
    first = result["rows"][0]
    return f"median of {first.get('repeats', first.get('rounds'))}, interleaved"


def freeswim(result: dict) -> list[str]:
    heads, rows = freeswim_tables.quality(result)
    return [*table(heads, rows), "", _where(result, freeswim_tables.quality_note(result))]


def freeswim_gpu(result: dict) -> list[str]:
    parts = [[*table(*make(result)), ""] for make in (freeswim_tables.steps,
                                                      freeswim_tables.passes)]
    return [*parts[0], *parts[1], _where(result, freeswim_tables.gpu_note(result))]


def _interleaved(result: dict) -> str:
    return _where(result, _rounds(result))


def _where(result: dict, what: str) -> str:
    device, versions = result["device"], result["versions"]
    name = device if isinstance(device, str) else device["name"]
    if isinstance(device, dict) and device["type"] == "cpu":
        name += f", {device['threads']} threads"
    parts = [what, f"{name}, torch {versions['torch']}", result.get("created", "")[:10],
             f"`benchmarks/results/{result['file']}`"]
    return "; ".join(part for part in parts if part) + "."


_ability = _told(model_tables.ability,
                 lambda _: "prompts of pairs never seen in training, the model's own settings")
_methods = _told(method_tables.methods, method_tables.methods_note)
_architectures = _told(method_tables.architectures, _rounds)
_staged = _told(staged_tables.quality, staged_tables.quality_note)
_cases = _told(kernel_tables.kernel_cases,
               lambda _: "random sizes, strides, lists, ragged blocks and tails")
# files of a table, more than one apart by spaces, and what makes it of them
TABLES: dict[str, tuple[str, Callable[..., list[str]]]] = {
    "quality": ("tiny_video_quality_cuda.json", quality),
    "forward-cpu": ("tiny_video_forward_cpu.json", forward),
    "forward-cuda": ("tiny_video_forward_cuda.json", forward),
    "denoiser": ("denoiser_cuda.json", _told(kernel_tables.denoiser, _rounds)),
    "kernels": ("kernels_cuda.json", _told(
        kernel_tables.kernels, kernel_tables.kernels_note)),
    "kernels-host": ("kernels_host_cuda.json kernels_cuda.json", _told(
        kernel_tables.host, kernel_tables.host_note)),
    "windows": ("windows_cuda.json", _told(kernel_tables.windows, kernel_tables.windows_note)),
    "sanitize": ("sanitize_cuda.json", _told(
        kernel_tables.sanitize, lambda _: "compute-sanitizer")),
    "kernel-cases": ("kernel_cases_cuda.json kernel_cases_triton_cuda.json", _cases),
    "cpu-attention": ("cpu_attention.json", _told(kernel_tables.cpu_attention, _rounds)),
    "batch": ("batch-cpu.json", batch),
    "batch-workers": ("batch-workers-cpu.json", batch_workers),
    "batch-workers-cuda": ("batch-workers-cuda.json", batch_workers),
    "ability": ("tiny_video_ability.json", _ability),
    "image-ability": ("tiny_image_ability.json", _ability),
    "cpu-seconds": ("tiny_image_seconds_cpu.json tiny_video_seconds_cpu.json", _told(
        model_tables.seconds, lambda result: "mean of 2, stock")),
    "unet-ability": ("tiny_unet_ability.json", _ability),
    "image-training": ("tiny_image_training.json", _told(model_tables.image_training,
                                                         model_tables.image_training_note)),
    "eight-bits": ("eight_bits.json", _told(model_tables.eight_bits,
                                            model_tables.eight_bits_note)),
    "evaluator": ("evaluator.json", _told(
        model_tables.evaluator, lambda _: "renders of pairs never seen in training")),
    "attention-mass": ("attention_mass.json", _told(model_tables.attention_mass,
                                                    model_tables.mass_note)),
    "gallery": ("gallery.json", _told(model_tables.gallery, model_tables.gallery_note)),
    **{f"gallery-{kind}": ("gallery.json", _told(model_tables.gallery_prompts(kind),
                                                 model_tables.gallery_note))
       for kind in ("pictures", "clips")},
    "methods-reading": ("methods_tiny_video_cuda_0.25.json", method_tables.reading),
    "methods-reading-0.1": ("methods_tiny_video_cuda_0.1.json", method_tables.reading),
    "methods-0.1": ("methods_tiny_video_cuda_0.1.json", _methods),
    "architectures-reading": ("architectures_cuda.json", method_tables.speed_reading),
    "architectures-reading-0.25": ("architectures_cuda_0.25.json", method_tables.speed_reading),
    "hunyuan-reading": ("architectures_hunyuan_cuda.json", method_tables.speed_reading),
    "architectures-hunyuan": ("architectures_hunyuan_cuda.json", _architectures),
    "methods": ("methods_tiny_video_cuda_0.25.json", _methods),
    "architectures": ("architectures_cuda.json", _architectures),
    "architectures-compiled": ("architectures_cuda_compiled.json", _architectures),
    "staged-pictures": ("staged_tiny-video_picture_cuda.json", _staged),
    "staged-clips": ("staged_tiny-video_clip_cuda.json", _staged),
    "staged-images-1024": ("staged_tiny-image-1024_picture_cuda.json", _staged),
    "staged-images": ("staged_tiny-image_picture_cuda.json", _staged),
    "mask-maps": ("mask_maps.json", mask_maps),
    "backward": ("backward_cuda.json", _told(kernel_tables.backward, kernel_tables.backward_note)),
    "finetune": ("finetune_cpu_tiny.json", finetune),
    "freeswim": ("freeswim_cuda.json", freeswim),
    "freeswim-gpu": ("freeswim_gpu_cuda.json", freeswim_gpu),
    "staged-loop": ("staged_loop_cuda.json staged_loop_2048_cuda.json", _told(
        staged_tables.loops, staged_tables.loops_note)),
    "tokens-time": ("tokens_eager_cuda.json tokens_cuda.json", _told(
        token_tables.times, token_tables.times_note)),
    "tokens-overhead": ("tokens_eager_cuda.json", _told(
        token_tables.overhead, token_tables.overhead_note)),
    "tokens-time-graph": ("tokens_cuda_graph.json", _told(
        token_tables.times, token_tables.graph_note)),
    "tokens-time-compiled": ("tokens_cuda_compiled.json", _told(
        token_tables.times, lambda result: f"transformer layers compiled; {_rounds(result)}")),
    "tokens-overhead-graph": ("tokens_cuda_graph.json", _told(
        token_tables.overhead, lambda result: "replayed as CUDA graphs, float16")),
    "tokens-operations": ("token_operations.json", _told(
        token_tables.operations, lambda _: "stock over what is left, ranking not counted")),
    "tokens-quality": ("tokens_quality_tiny-unet_cuda.json", _told(
        token_tables.quality, token_tables.quality_note)),
    "tokens-quality-alike": ("tokens_quality_tiny-unet_cpu.json", _told(
        token_tables.quality, token_tables.quality_note)),
    "tokens-quality-image": ("tokens_quality_tiny-image_cpu.json", _told(
        token_tables.quality, token_tables.quality_note)),
}


def filled(text: str) -> str:
    """The text with every `<!-- table NAME -->` ... `<!-- end -->` part made anew.

    A part whose result file does not exist stays as it is.
    """
    for name, (files, make) in TABLES.items():
        begin = f"<!-- table {name} -->"
        found = [file for file in files.split() if (RESULTS / file).is_file()]
        if begin not in text or not found:
            continue
        results = [{**json.loads((RESULTS / file).read_text()), "file": file} for file in found]
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition("<!-- end -->")
        text = "\n".join([head + begin, *make(*results), "<!-- end -->"]) + tail
    return text


def main() -> int:
    stale = []
    for page in [word for word in sys.argv[1:] if word != "--check"] or PAGES:
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
