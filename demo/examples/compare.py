"""Stock and FastDiff with the same seed: time, PSNR, and both side by side.

python demo/examples/compare.py "a red apple on a blue background" --steps 8
"""

import argparse
import math
import time

import numpy as np
import torch
from PIL import Image

import fastdiff  # noqa: F401  adds enable_fastdiff and disable_fastdiff to pipelines
from fastdiff.models import defaults, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--method", default="balanced")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", default="compare.png")
    args = parser.parse_args()

    pipe = load(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)

    def picture() -> tuple[np.ndarray, float]:
        """[height, width, 3] in 0..1 and the seconds; the same noise every time."""
        begin = time.perf_counter()
        frames = pipe(
            args.prompt, height=args.size, width=args.size, num_frames=1,
            num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0),
            **defaults(args.model).arguments,
        ).frames[0]
        return frames[0], time.perf_counter() - begin

    stock, stock_seconds = picture()
    # short sequences stay dense by default; this one is to be sparse
    pipe.enable_fastdiff(args.method, min_tokens=1, max_density=1.0)
    fast, fast_seconds = picture()
    print(pipe.fastdiff)
    pipe.disable_fastdiff()
    again, _ = picture()
    assert (again == stock).all(), "disabled is stock, bit for bit"

    error = float(((stock - fast) ** 2).mean())
    near = "equal" if error == 0 else f"PSNR {-10 * math.log10(error):.1f} dB"
    print(f"stock {stock_seconds:.1f} s, {args.method} {fast_seconds:.1f} s, {near}")
    both = np.concatenate([stock, fast], axis=1)
    Image.fromarray((both * 255).round().astype(np.uint8)).save(args.out)
    print(f"left stock, right {args.method}: {args.out}")


if __name__ == "__main__":
    main()
