"""Draw the README's clips of the shipped model, stock above FastDiff, as they come.

python benchmarks/pictures.py   # writes docs/images/clips.png
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from fastdiff.models import defaults, load  # noqa: E402

CLIPS = ("a red apple moving left on a blue background",
         "a rocket moving up on a black background",
         "a pine tree growing on a purple background")
SHOWN, EDGE, CAPTION = 6, 160, 18


def frames(pipe: Any, prompt: str, count: int) -> np.ndarray:
    """[T, H, W, 3] in [0, 1]."""
    own = defaults("tiny-video")
    return pipe(
        prompt, height=own.height, width=own.width, num_frames=count,
        num_inference_steps=own.steps, guidance_scale=own.guidance, **own.arguments,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]


def row(pictures: list[np.ndarray], caption: str) -> Image.Image:
    sheet = Image.new("RGB", (EDGE * len(pictures), EDGE + CAPTION), "white")
    for i, picture in enumerate(pictures):
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        sheet.paste(image.resize((EDGE, EDGE), Image.Resampling.LANCZOS), (i * EDGE, 0))
    ImageDraw.Draw(sheet).text((4, EDGE + 3), caption, fill="black")
    return sheet


def save(rows: list[Image.Image], path: Path) -> None:
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for part in rows:
        sheet.paste(part, (0, top))
        top += part.height
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part.png")
    sheet.save(partial, optimize=True)
    os.replace(partial, path)
    print(path.relative_to(ROOT))


def main() -> None:
    pipe = load("tiny-video", device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for prompt in CLIPS:
        for name in ("stock", "FastDiff"):
            if name == "FastDiff":
                pipe.enable_fastdiff()
            clip = frames(pipe, prompt, 33)
            shown = [clip[i] for i in np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)]
            density = ""
            if name == "FastDiff":
                total = pipe.fastdiff.report.summary()["density_all_calls"]
                density = f" (balanced, {total:.0%} of the attention)"
            pipe.disable_fastdiff()
            rows.append(row(shown, f"{prompt}: {name}{density}"))
    save(rows, ROOT / "docs/images/clips.png")


if __name__ == "__main__":
    main()
