"""A small chart on Pillow: axes in data coordinates, points, lines, words that do not overlap."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
INK: Colour = (40, 40, 40)
FAINT: Colour = (205, 205, 205)
# Okabe and Ito's, told apart by the colour-blind
BLUE: Colour = (0, 114, 178)
ORANGE: Colour = (213, 94, 0)
GREEN: Colour = (0, 158, 115)
GRAY: Colour = (120, 120, 120)
_FINE, _SHARP = 4, 2


class Chart:
    """One panel of `size` points; saved at two pixels a point.

    x, y: (least, most) of the data. Margins are left for ticks, axis titles, and lines of notes.
    """

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float],
                 notes: Sequence[str] = ()):
        self.size, self.x, self.y, self.notes = size, x, y, notes
        self.left, self.right = 62, size[0] - 16
        self.top, self.bottom = 34 + 15 * len(notes), size[1] - 46
        self.image = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._taken: list[Box] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to points."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (self.left + across * (self.right - self.left),
                self.bottom - up * (self.bottom - self.top))

    def axes(self, title: str, x_title: str, y_title: str,
             x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> None:
        for value, name in y_ticks:
            _, y = self.at(self.x[0], value)
            self._line((self.left, y), (self.right, y), FAINT, 0.6)
            self.words(self.left - 6, y, name, anchor="rm")
        for value, name in x_ticks:
            x, _ = self.at(value, self.y[0])
            self._line((x, self.bottom), (x, self.bottom + 4), INK, 0.8)
            self.words(x, self.bottom + 7, name, anchor="mt")
        self._line((self.left, self.bottom), (self.right, self.bottom), INK, 1)
        middle = (self.left + self.right) / 2
        self.words(middle, self.size[1] - 8, x_title, anchor="mb")
        self.words(8, 8, title, size=13, anchor="lt")
        for i, note in enumerate(self.notes):
            self.words(8, 30 + 15 * i, note, GRAY, anchor="lm")
        self._upright(y_title)

    def words(self, x: float, y: float, text: str, colour: Colour = INK, size: int = 11,
              anchor: str = "lm") -> Box:
        """Words at a place in points; the box that they take."""
        font = ImageFont.load_default(size * _FINE)
        where = (x * _FINE, y * _FINE)
        self._draw.text(where, text, fill=colour, font=font, anchor=anchor)
        a, b, c, d = self._draw.textbbox(where, text, font=font, anchor=anchor)
        return a / _FINE, b / _FINE, c / _FINE, d / _FINE

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1,
             dashed: bool = False) -> None:
        """Through data points; dashed only for a straight one."""
        ends = [self.at(*point) for point in points]
        for begin, end in zip(ends, ends[1:], strict=False):
            if not dashed:
                self._line(begin, end, colour, width)
                continue
            length = max(1.0, ((end[0] - begin[0]) ** 2 + (end[1] - begin[1]) ** 2) ** 0.5)
            for start in range(0, int(length), 8):
                a, b = start / length, min(1.0, (start + 4) / length)
                self._line(_between(begin, end, a), _between(begin, end, b), colour, width)

    def point(self, x: float, y: float, colour: Colour, radius: float = 4,
              hollow: bool = False) -> None:
        across, up = self.at(x, y)
        box = [v * _FINE for v in (across - radius, up - radius, across + radius, up + radius)]
        self._draw.ellipse(box, fill="white" if hollow else colour, outline=colour,
                           width=round(1.5 * _FINE))
        self._taken.append((across - radius, up - radius, across + radius, up + radius))

    def keep_clear(self, begin: tuple[float, float], end: tuple[float, float]) -> None:
        """Labels stay off this box, two corners in data."""
        (a, b), (c, d) = self.at(*begin), self.at(*end)
        self._taken.append((min(a, c), min(b, d), max(a, c), max(b, d)))

    def label(self, x: float, y: float, text: str, colour: Colour = INK) -> None:
        """Words beside a data point, at the nearest free place; a thin line where that is far.

        Draw all points first. ValueError where no place is free.
        """
        px, py = self.at(x, y)
        font = ImageFont.load_default(11 * _FINE)
        width, height = font.getlength(text) / _FINE, 13
        for far in range(8, 120, 4):
            spots = [(px + far, py - height / 2), (px - far - width, py - height / 2),
                     (px - width / 2, py - far - height), (px - width / 2, py + far)]
            spots += [(px + far * s - (width if s < 0 else 0), py + far * t - height / 2)
                      for s in (1, -1) for t in (-1, 1)]
            for a, b in spots:
                box = (a, b, a + width, b + height)
                if self._free(box):
                    self._taken.append(box)
                    if far > 16:
                        near = min(max(px, a), a + width), min(max(py, b), b + height)
                        self._line((px, py), near, GRAY, 0.6)
                    self.words(a, b + height / 2, text, colour)
                    return
        raise ValueError(f"no free place for the label {text!r}: make the chart larger")

    def _free(self, box: Box) -> bool:
        inside = (self.left < box[0] and box[2] < self.right
                  and self.top < box[1] and box[3] < self.bottom)
        return inside and not any(box[0] < c and a < box[2] and box[1] < d and b < box[3]
                                  for a, b, c, d in self._taken)

    def _line(self, begin: tuple[float, float], end: tuple[float, float], colour: Colour,
              width: float) -> None:
        self._draw.line([(v[0] * _FINE, v[1] * _FINE) for v in (begin, end)], fill=colour,
                        width=max(1, round(width * _FINE)))

    def _upright(self, text: str) -> None:
        font = ImageFont.load_default(11 * _FINE)
        strip = Image.new("RGB", (round(font.getlength(text)) + 8, 16 * _FINE), "white")
        ImageDraw.Draw(strip).text((2, 8 * _FINE), text, fill=INK, font=font, anchor="lm")
        strip = strip.rotate(90, expand=True)
        middle = (self.top + self.bottom) / 2 * _FINE
        self.image.paste(strip, (4 * _FINE, round(middle - strip.height / 2)))


def save(panels: Sequence[Chart], path: Path) -> None:
    """Panels side by side as one PNG."""
    width, height = sum(p.size[0] for p in panels), max(p.size[1] for p in panels)
    sheet, x = Image.new("RGB", (width * _SHARP, height * _SHARP), "white"), 0
    for panel in panels:
        size = (panel.size[0] * _SHARP, panel.size[1] * _SHARP)
        sheet.paste(panel.image.resize(size, Image.Resampling.LANCZOS), (x, 0))
        x += size[0]
    data = io.BytesIO()
    sheet.quantize(256, Image.Quantize.FASTOCTREE).save(data, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_bytes(data.getvalue())
    os.replace(partial, path)
    print(f"{path}: {data.tell():,} bytes")


def _between(begin: tuple[float, float], end: tuple[float, float], share: float
             ) -> tuple[float, float]:
    return (begin[0] + (end[0] - begin[0]) * share, begin[1] + (end[1] - begin[1]) * share)
