"""Contact sheets of pictures and clips as PNG and GIF, with captions and a limit of size."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LINE, INK = 6, 14, (40, 40, 40)
SHADES = (128, 96, 64, 48, 32)


def tiles(frames: Tensor, edge: int) -> list[Image.Image]:
    """Frames [N, 3, H, W] in [0, 1] as pictures of `edge` pixels."""
    small = F.interpolate(frames.float(), size=(edge, edge), mode="area")
    pixels = (small * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in pixels]


def text(words: str, width: int) -> Image.Image:
    """One line of words, cut where it would leave `width` pixels."""
    font = ImageFont.load_default(11)
    while words and font.getlength(words) > width:
        words = words[:-1]
    line = Image.new("RGB", (width, LINE), "white")
    ImageDraw.Draw(line).text((0, 0), words, fill=INK, font=font)
    return line


def beside(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    x = 0
    for part in parts:
        sheet.paste(part, (x, 0))
        x += part.width + gap
    return sheet


def below(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (max(part.width for part in parts), height), "white")
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height + gap
    return sheet


def grid(parts: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    rows = [parts[i: i + columns] for i in range(0, len(parts), columns)]
    return below([beside(row, gap) for row in rows], gap)


def save_png(sheet: Image.Image, path: Path, colours: int, dither: bool = True) -> None:
    """In a palette of so many colours, which keeps the file small."""
    palette = sheet.quantize(colours, Image.Quantize.MEDIANCUT)
    how = Image.Dither.FLOYDSTEINBERG if dither else Image.Dither.NONE
    sheet = sheet.quantize(palette=palette, dither=how)
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    _write(path, data)


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int, limit: int) -> int:
    """An endless animation of at most `limit` bytes; the colours that it took, 128 at most.

    All frames share one palette, so that what stands still stays as it is. ValueError where not
    even the fewest colours fit.
    """
    sample = below(frames[:: max(1, len(frames) // 4)])
    for colours in SHADES:
        palette = sample.quantize(colours, Image.Quantize.MEDIANCUT)
        drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        data = io.BytesIO()
        drawn[0].save(data, "GIF", save_all=True, append_images=drawn[1:], loop=0,
                      duration=milliseconds, optimize=True)
        if data.tell() <= limit:
            _write(path, data)
            return colours
    raise ValueError(f"the animation has {data.tell()} bytes in {SHADES[-1]} colours, more than "
                     f"{limit}: take fewer frames or smaller tiles")


def _write(path: Path, data: io.BytesIO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_bytes(data.getvalue())
    os.replace(partial, path)
    print(f"{path}: {data.tell():,} bytes")
