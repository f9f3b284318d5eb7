"""What token methods do to pictures of trained models: likeness to stock, prompt control, time.

python benchmarks/tokens.py --model tiny-unet --linfusion out/linear   # 64 prompts
python benchmarks/tokens.py --model tiny-video
python benchmarks/tokens.py --tiny                                         # a smoke run on a CPU

Every picture is compared with stock's of the same seed. Rows of control: fewer steps, from which
the one with as much time is read off, and tomesd 0.1.3 where it is installed (UNets only; at its
default it skips every block of a UNet without attention at full resolution, so it gets
max_downsample=8). The guard is off: what a method does is wanted, also where it does not pay.
Pictures stay on the device that made them and are judged there.
"""

import argparse
import importlib
import itertools
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from clips import decode, synchronize  # noqa: E402
from likeness import likeness, mean_ci  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff import models  # noqa: E402
from fastdiff.method import Method  # noqa: E402
from fastdiff.tokens.at_edm import AtEdm  # noqa: E402
from fastdiff.tokens.kv_downsample import KVDownsample  # noqa: E402
from fastdiff.tokens.linfusion import LinFusion  # noqa: E402
from fastdiff.tokens.query_skip import QuerySkip  # noqa: E402
from fastdiff.tokens.tome import ToMe  # noqa: E402
from fastdiff.tokens.zero_tprune import ZeroTPrune  # noqa: E402
from training.captions import plain_caption  # noqa: E402
from training.evaluator import Evaluator  # noqa: E402
from training.sampling import held_out_scenes  # noqa: E402

STOCK = "stock"
PEER = "tomesd 0.1.3, ratio 0.5"
# steps of the run before the first that is timed
WARM = 4


def rows_of(pipe: Any, linfusion: Path | None) -> dict[str, tuple[Method, ...]]:
    """Name -> methods, for this kind of denoiser."""
    off: dict[str, Any] = {"guard": False}
    keys: dict[str, Any] = {"min_tokens": 0, **off}
    found: dict[str, tuple[Method, ...]] = {STOCK: ()}
    for pool, correct in (("mean", True), ("mean", False), ("nearest", True)):
        name = f"kv-downsample, {pool}{'' if correct else ', no correction'}"
        found[name] = (KVDownsample(pool=pool, correct=correct, **keys),)
    if not hasattr(pipe, "unet"):
        found["kv-downsample 4"] = (KVDownsample(factor=4, **keys),)
        for keep, skipped in itertools.product((0.75, 0.5), ("pooled", "nothing")):
            found[f"query-skip {keep}, {skipped}"] = (
                QuerySkip(keep=keep, skipped=skipped, min_tokens=0, factor=4),)
        return found
    for recover in ("similar", "increment", "own"):
        found[f"at-edm, {recover}"] = (AtEdm(recover=recover, **off),)
    for recover in ("similar", "increment"):
        found[f"at-edm, {recover}, alike in attention"] = (
            AtEdm(recover=recover, alike="attention", **off),)
    found |= {
        "at-edm, 3 iterations": (AtEdm(iterations=3, **off),),
        "at-edm, no early steps": (AtEdm(early_steps=0, **off),),
        "at-edm, not aligned": (AtEdm(align=False, **off),),
        "at-edm, all blocks": (AtEdm(layout="all", **off),),
        "at-edm, all blocks, increment": (AtEdm(layout="all", recover="increment", **off),),
        "at-edm, keep 0.6": (AtEdm(keep=0.6, **off),),
        "zero-tprune": (ZeroTPrune(**off),),
        "at-edm + kv-downsample": (AtEdm(**off), KVDownsample(**keys)),
        "tome 0.5": (ToMe(),),
        "tome 0.5, two levels": (ToMe(levels=2),),
    }
    if linfusion is not None:
        found["linfusion"] = (LinFusion(weights=str(linfusion)),)
    return found


class Studio:
    """Makes pictures or clips [B, T, 3, H, W] in [0, 1] of one model."""

    def __init__(self, pipe: Any, call: dict[str, Any], device: str) -> None:
        self.pipe, self.call, self.device = pipe, call, device
        self.wan = type(pipe.vae).__name__ == "AutoencoderKLWan"

    def make(self, prompts: list[str], seeds: list[int], **changes: Any) -> tuple[Tensor, float]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        synchronize(self.device)
        begin = time.perf_counter()
        found = self.pipe(prompts, generator=generators,
                          output_type="latent" if self.wan else "pt",
                          **{**self.call, **changes})
        synchronize(self.device)
        seconds = (time.perf_counter() - begin) / len(prompts)
        if self.wan:
            return decode(self.pipe, found.frames), seconds
        frames = found.frames if hasattr(found, "frames") else found.images
        frames = frames if frames.dim() == 5 else frames[:, None]
        return frames.float().clamp(0, 1), seconds


def runs(studio: Studio, args: argparse.Namespace, rows: dict[str, tuple[Method, ...]]
         ) -> list[tuple[str, tuple[Method, ...], dict[str, Any]]]:
    """(name, methods, changes of the call): the methods, then fewer steps, then the peer."""
    found: list[tuple[str, tuple[Method, ...], dict[str, Any]]] = [
        (name, methods, {}) for name, methods in rows.items()]
    for share in (0.9, 0.8, 0.7, 0.6):
        steps = max(1, round(share * args.steps))
        found.append((f"stock, {steps} steps", (), {"num_inference_steps": steps}))
    if hasattr(studio.pipe, "unet") and find_spec("tomesd") is not None:
        found.append((PEER, (), {}))
    return [run for run in found if not args.only or run[0] in (STOCK, *args.only)]


@torch.no_grad()
def compare(studio: Studio, args: argparse.Namespace, scenes: list[Any],
            rows: dict[str, tuple[Method, ...]], save: Callable[[list[dict]], None]
            ) -> list[dict[str, Any]]:
    prompts = [plain_caption(scene) for scene in scenes]
    judge, found, stock = Evaluator(studio.device), [], None
    for name, methods, changes in runs(studio, args, rows):
        fastdiff.disable(studio.pipe)
        if methods:
            fastdiff.enable(studio.pipe, *methods)
        if name == PEER:
            importlib.import_module("tomesd").apply_patch(studio.pipe, ratio=0.5, max_downsample=8)
        clock = time.perf_counter()
        made, seconds, told = [], [], {}
        # a few steps to warm up
        studio.make(prompts[:args.batch], list(range(len(prompts[:args.batch]))),
                    num_inference_steps=min(WARM, args.steps))
        for begin in range(0, len(prompts), args.batch):
            some = prompts[begin:begin + args.batch]
            seeds = list(range(5000 + begin, 5000 + begin + len(some)))
            frames, spent = studio.make(some, seeds, **changes)
            made.append(frames)
            seconds.append(spent)
        making, clock = time.perf_counter() - clock, time.perf_counter()
        if methods:
            told = studio.pipe.fastdiff.report.summary()
            told = {"told": told["methods"], "stock_calls": told["fallbacks"]}
        if name == PEER:
            importlib.import_module("tomesd").remove_patch(studio.pipe)
        clips = torch.cat(made)
        stock = clips if stock is None else stock
        near = likeness(clips, stock)
        figures = judge.clips(clips, scenes)
        judging = time.perf_counter() - clock
        found.append({"variant": name, **changes, "seconds": record.spread(seconds)["seconds"],
                      **{k: mean_ci([one[k] for one in near]) for k in near[0]},
                      "control": figures, **told})
        # a run that is cut short leaves what it has
        save(found)
        print(f"{name:<32} {found[-1]['seconds'] * 1e3:8.1f} ms  psnr "
              f"{found[-1]['psnr']['mean']:6.2f}  ssim {found[-1]['ssim']['mean']:.4f}  object "
              f"{figures['object']:.3f}  colour {figures['colour']:.3f}  (making {making:.1f} s, "
              f"judging {judging:.1f} s)", flush=True)
    fastdiff.disable(studio.pipe)
    return found


def toy(folder: Path) -> Path:
    """An untrained tiny-unet, for a smoke run."""
    from training.unet_models import UNetState, export_unet

    config = Path(__file__).parents[1] / "training" / "tiny_unet_test.toml"
    state = UNetState(tomllib.loads(config.read_text()), torch.device("cpu"))
    export_unet(state, folder / "toy-unet")
    return folder / "toy-unet"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-video", help="a shipped model, or a folder")
    parser.add_argument("--linfusion", type=Path, help="weights distilled from this UNet")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="*", default=[], help="rows beside stock, by their names")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiny", action="store_true", help="an untrained model, two prompts")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            args.model, args.prompts, args.batch, args.steps = str(toy(Path(folder))), 2, 2, 4
        model = models.find(args.model)
        pipe = models.load(args.model, device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    known = model.defaults
    args.steps = args.steps or known.steps or 25
    call = {"num_inference_steps": args.steps, "height": known.height, "width": known.width,
            "guidance_scale": known.guidance, **known.arguments}
    if known.frames and "video" in known.kind:
        call["num_frames"] = known.frames
    call = {name: value for name, value in call.items() if value is not None}
    studio = Studio(pipe, call, device)
    scenes = held_out_scenes(args.prompts, clip=studio.wan)
    name = Path(args.model).name
    settings = {"model": name, "call": call, "prompts": args.prompts, "batch": args.batch,
                "dtype": args.dtype, "tiny": args.tiny}
    path = args.output / f"tokens_quality_{name}_{device}.json"
    compare(studio, args, scenes, rows_of(pipe, args.linfusion),
            lambda rows: record.write(path, "tokens quality", device, settings, rows))
    print(path)


if __name__ == "__main__":
    main()
