"""Contact sheets and frame strips as one image."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor


def grid(frames: Tensor, columns: int, edge: int, labels: list[str] | None = None) -> Image.Image:
    """Frames [N, 3, E, E] in [-1, 1] in rows of `columns`, with a line of words under each."""
    small = F.interpolate(frames.float(), size=(edge, edge), mode="area")
    pixels = ((small + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = (len(pixels) + columns - 1) // columns
    foot = 12 if labels else 0
    image = Image.new("RGB", (columns * edge, rows * (edge + foot)), "white")
    draw = ImageDraw.Draw(image)
    for i, pixel in enumerate(pixels):
        x, y = i % columns * edge, i // columns * (edge + foot)
        image.paste(Image.fromarray(pixel), (x, y))
        if labels:
            draw.text((x + 1, y + edge), labels[i][: edge // 6], fill="black")
    return image


def strips(video: Tensor, count: int, edge: int, labels: list[str]) -> Image.Image:
    """One row per clip [B, T, 3, E, E]: `count` frames spread over its length."""
    index = torch.linspace(0, video.shape[1] - 1, count).round().long()
    rows = [grid(clip[index.to(clip.device)], count, edge) for clip in video]
    image = Image.new("RGB", (count * edge, len(rows) * (edge + 12)), "white")
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        image.paste(row, (0, i * (edge + 12)))
        draw.text((1, i * (edge + 12) + edge), labels[i], fill="black")
    return image


def stack(images: list[Image.Image], path: Path) -> None:
    """All images under each other, as one PNG."""
    width, height = max(i.width for i in images), sum(i.height + 8 for i in images)
    sheet = Image.new("RGB", (width, height), "gray")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + 8
    sheet.save(path, optimize=False)
