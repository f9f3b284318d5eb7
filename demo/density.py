"""Realised density by layer and step: taken from the report as a run goes on, drawn as a chart."""

import html
from dataclasses import dataclass, field
from typing import Any

from fastdiff.report import LayerReport, Report


@dataclass
class Trace:
    """Calls of each layer at the end of each step: (sparse, dense)."""

    marks: list[list[tuple[int, int]]] = field(default_factory=list)

    def mark(self, report: Report) -> None:
        """A step has ended. Counts only: nothing waits for the device."""
        self.marks.append([(layer.sparse_calls, _dense(layer)) for layer in report.layers])

    def table(self, report: Report) -> dict[str, Any]:
        """{"layers": names, "density": one row a layer, one value a step, None where not called}.

        A dense call counts as 1; several calls of a step (two guidance branches) are averaged.
        """
        used = [(layer, place) for place, layer in enumerate(report.layers) if layer.index >= 0]
        used.sort(key=lambda found: found[0].index)
        rows = [self._row(layer, place) for layer, place in used]
        return {"layers": [layer.name for layer, _ in used], "density": rows}

    def _row(self, layer: LayerReport, place: int) -> list[float | None]:
        densities = layer.densities
        row: list[float | None] = []
        sparse = dense = 0
        for mark in self.marks:
            now_sparse, now_dense = mark[place] if place < len(mark) else (sparse, dense)
            kept = [*densities[sparse:now_sparse], *[1.0] * (now_dense - dense)]
            row.append(round(sum(kept) / len(kept), 4) if kept else None)
            sparse, dense = now_sparse, now_dense
        return row


def _dense(layer: LayerReport) -> int:
    return sum(layer.dense_calls.values()) + sum(layer.fallbacks.values())


_LEFT, _TOP, _BOTTOM, _LEGEND = 132, 22, 40, 240
NONE = "<p class='fd-note'>No attention call went through FastDiff in this run.</p>"


def chart(table: dict[str, Any]) -> str:
    """The table as SVG: a row a layer, a column a step, darker where more is computed."""
    rows = table["density"]
    steps = max((len(row) for row in rows), default=0)
    if not steps:
        return NONE
    wide = max(8, min(34, 640 // steps))
    high = max(6, min(22, 420 // len(rows)))
    width, height = _LEFT + max(wide * steps, _LEGEND) + 12, _TOP + high * len(rows) + _BOTTOM
    parts = [f"<svg class='fd-chart' viewBox='0 0 {width} {height}' role='img' "
             f"style='max-width:{width}px' aria-label='Density by layer and step'>"]
    every = max(1, round(14 / high))
    for y, (name, row) in enumerate(zip(table["layers"], rows, strict=True)):
        top = _TOP + y * high
        if y % every == 0:
            parts.append(f"<text x='{_LEFT - 8}' y='{top + high / 2 + 4}' text-anchor='end'>"
                         f"{html.escape(_short(name))}</text>")
        for x, value in enumerate(row):
            if value is None:
                continue
            parts.append(
                f"<rect x='{_LEFT + x * wide}' y='{top}' width='{wide - 1}' height='{high - 1}' "
                f"rx='2' fill='{_colour(value)}'><title>{html.escape(name)}, step {x + 1}: "
                f"density {value:.3f}</title></rect>")
            if wide >= 28 and high >= 15:
                parts.append(f"<text class='fd-value' x='{_LEFT + x * wide + (wide - 1) / 2}' "
                             f"y='{top + high / 2 + 3.5}' text-anchor='middle' "
                             f"fill='{_ink(value)}'>{value:.2f}</text>")
    return "".join([*parts, *_axes(steps, wide, _TOP + high * len(rows)), "</svg>"])


def _axes(steps: int, wide: int, bottom: int) -> list[str]:
    every = max(1, round(28 / wide))
    marks = [f"<text x='{_LEFT + x * wide + (wide - 1) / 2}' y='{_TOP - 8}' text-anchor='middle'>"
             f"{x + 1}</text>" for x in range(steps) if x % every == 0]
    marks.append(f"<text x='{_LEFT - 8}' y='{_TOP - 8}' text-anchor='end'>step</text>")
    for i in range(11):
        marks.append(f"<rect x='{_LEFT + i * 16}' y='{bottom + 14}' width='16' height='10' "
                     f"fill='{_colour(i / 10)}'/>")
    marks.append(f"<text x='{_LEFT - 8}' y='{bottom + 23}' text-anchor='end'>density 0</text>"
                 f"<text x='{_LEFT + 182}' y='{bottom + 23}'>1 (dense)</text>")
    return marks


# from light to deep blue, even in lightness
_STOPS = ((232, 241, 250), (158, 202, 225), (66, 146, 198), (8, 81, 156), (8, 40, 92))


def _colour(value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    share = place - low
    mixed = (round(a + (b - a) * share)
             for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _ink(value: float) -> str:
    return "#0b2545" if value < 0.45 else "#ffffff"


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"…{name[-19:]}"
