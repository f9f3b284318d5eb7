"""What eight bits do to the shipped models: the error of their weights, PSNR of their pictures.

python benchmarks/eight_bits.py --model tiny-image --original FOLDER     # its bf16 pipeline folder
python benchmarks/eight_bits.py --model tiny-image tiny-unet --original FOLDER FOLDER

The original is what training wrote; every packed weight has to lie within half a step of it, or the
folder is refused. Both make the same held-out prompts from the same seeds in float32, each with the
model's own settings. The original once more in bf16 arithmetic is the yardstick.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from ability import call  # noqa: E402
from likeness import mean_ci, similarity  # noqa: E402

from fastdiff.models import Model, find, load  # noqa: E402
from fastdiff.models.packed import ENDING, SCALE  # noqa: E402
from training.captions import plain_caption  # noqa: E402
from training.sampling import held_out_scenes  # noqa: E402

# of a step; float32 scales cannot put a tie on a better side
HALF = 0.5 + 1e-4


def weights(folder: Path, original: Path) -> dict[str, Any]:
    """How many weights are packed, their relative error, and the largest error in steps.

    ValueError where the packed weights are not those of the original.
    """
    count, wrong, power, worst = 0, 0.0, 0.0, 0.0
    for path in sorted(folder.glob(f"*/*{ENDING}")):
        part = path.parent.name
        (source,) = (original / part).glob("*.safetensors")
        packed, plain = load_file(path), load_file(source)
        names = {name for name in packed if not name.endswith(SCALE)}
        if names != set(plain):
            raise ValueError(f"{source}: other tensors than the packed {part}")
        for name, value in plain.items():
            if packed[name].dtype != torch.int8:
                if not torch.equal(packed[name], value.to(packed[name].dtype)):
                    raise ValueError(f"{source}: {name} is not what was packed")
                continue
            step = packed[name + SCALE].view(-1, *(1 for _ in value.shape[1:]))
            gap = (packed[name].float() * step - value.float()).abs()
            worst = max(worst, float((gap / step).max()))
            if worst > HALF:
                raise ValueError(f"{source}: {name} is {worst:.2f} steps off, not what was packed")
            count += value.numel()
            wrong += float(gap.square().sum())
            power += float(value.float().square().sum())
    if not count:
        raise ValueError(f"{folder} has no packed weights (*{ENDING})")
    return {"packed_weights": count, "relative_error": (wrong / power) ** 0.5,
            "largest_error_in_steps": round(worst, 4)}


def pictures(model: Model, own: Model, dtype: str, count: int) -> Tensor:
    """[count, 1, 3, H, W] in [0, 1], one prompt a call. own: whose settings."""
    pipe = load(model, "cpu", dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts = [plain_caption(scene) for scene in held_out_scenes(count, clip=False)]
    defaults = own.defaults
    assert defaults.height is not None
    return torch.cat([call(pipe, [prompt], defaults.height, None, seed, defaults, None)
                      for seed, prompt in enumerate(prompts)])


def compared(name: str, original: Path, count: int) -> dict[str, Any]:
    shipped = find(name)
    assert shipped.folder is not None
    row: dict[str, Any] = {"model": name, "sha256": shipped.sha256,
                           **weights(shipped.folder, original)}
    plain = replace(find(original), name=name)
    made = pictures(plain, shipped, "float32", count)
    for what, model, dtype in (("eight_bits", shipped, "float32"), ("bf16", plain, "bfloat16")):
        psnr, ssim = similarity(pictures(model, shipped, dtype, count), made)
        row[what] = {"psnr": mean_ci(psnr), "ssim": mean_ci(ssim), "each_psnr": psnr}
    return row | {"pictures": count, "size": shipped.defaults.height}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="shipped names")
    parser.add_argument("--original", nargs="+", type=Path, required=True,
                        help="their bf16 pipeline folders, in the same order")
    parser.add_argument("--pictures", type=int, default=4, help="of each model")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS / "eight_bits.json")
    args = parser.parse_args()
    if len(args.model) != len(args.original):
        parser.error(f"{len(args.model)} models and {len(args.original)} originals: give one each")
    rows = []
    for name, original in zip(args.model, args.original, strict=True):
        rows.append(compared(name, original, args.pictures))
        print(rows[-1], flush=True)
        record.write(args.output, "eight_bits", "cpu",
                     {"prompts": "held-out pairs", "models": args.model}, rows)


if __name__ == "__main__":
    main()
