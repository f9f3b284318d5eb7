"""Pictures of a recording: tiles on the frames, and the map of tiles by tiles."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastdiff.demo.recording import Place

MOST_FRAMES, SIDE, GAP, LABEL = 9, 240, 10, 30
KEPT, QUERY = (59, 130, 246), (255, 214, 10)
# black, purple, orange, light yellow: even steps of lightness
_HEAT = np.array([(10, 7, 30), (94, 25, 110), (196, 61, 78), (249, 142, 9), (252, 255, 164)], float)
MAP = 384


@dataclass(frozen=True)
class Sheet:
    """Frames beside each other. Turns a point of the picture into a tile of queries."""

    place: Place
    shown: tuple[int, ...]
    size: tuple[int, int]

    @property
    def columns(self) -> int:
        return min(3, len(self.shown))

    @property
    def label(self) -> int:
        """Pixels over each frame for its number; a single picture needs none."""
        return LABEL if len(self.shown) > 1 else 0

    def corner(self, number: int) -> tuple[int, int]:
        """(left, top) of a frame's picture."""
        height, width = self.size
        row, column = divmod(number, self.columns)
        return (GAP + column * (width + GAP), GAP + row * (height + GAP + self.label) + self.label)

    def tile_at(self, x: float, y: float) -> int | None:
        """The tile under a point, None between frames."""
        height, width = self.size
        _, rows, columns = self.place.layout.grid
        for number, frame in enumerate(self.shown):
            left, top = self.corner(number)
            if 0 <= x - left < width and 0 <= y - top < height:
                row = int((y - top) * rows / height)
                column = int((x - left) * columns / width)
                return int(_tile_grid(self.place)[frame, row, column])
        return None


def sheet(place: Place, frames: Any) -> Sheet:
    """Where each latent frame goes: at most nine, evenly spaced, in rows of three."""
    count = place.layout.grid[0]
    shown = np.unique(np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int))
    height, width = frames.shape[1:3]
    side = SIDE if len(shown) > 1 else 2 * SIDE
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return Sheet(place, tuple(int(n) for n in shown), size)


def on_frames(plan: Sheet, frames: Any, values: Any, query: int, heat: bool) -> Any:
    """uint8 picture: `values` [N] of the key tiles over the frames, the query tile outlined.

    heat: a colour scale up to the largest value; else kept tiles are blue and others dimmed.
    """
    tiles, (height, width) = _tile_grid(plan.place), plan.size
    rows = -(-len(plan.shown) // plan.columns)
    canvas = Image.new("RGB", (GAP + plan.columns * (width + GAP),
                               GAP + rows * (height + GAP + plan.label)), (20, 26, 36))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=19)
    last = max(1, plan.place.layout.grid[0] - 1)
    for number, frame in enumerate(plan.shown):
        left, top = plan.corner(number)
        picture = frames[round(frame * (len(frames) - 1) / last)]
        base = np.asarray(Image.fromarray((picture * 255).round().astype("uint8")).resize(
            (width, height), Image.Resampling.BICUBIC), dtype=float)
        cells = _grow(values[tiles[frame]], height, width)
        canvas.paste(Image.fromarray(_over(base, cells, heat)), (left, top))
        _outline(draw, tiles[frame] == query, (left, top), plan.size)
        if len(plan.shown) > 1:
            draw.text((left, top - LABEL + 4), f"frame {frame + 1}", fill=(205, 214, 228),
                      font=font)
    return np.asarray(canvas)


def tile_map(values: Any, query: int, heat: bool) -> Any:
    """uint8 picture of [N, N]: a row a query tile, a column a key tile; `query` is marked."""
    shown = np.log10(np.clip(values, 1e-4, 1)) / 4 + 1 if heat else values
    colours = _heat(shown) if heat else _blue(shown)
    scale = max(1, round(MAP / len(values)))
    grown = np.repeat(np.repeat(colours, scale, 0), scale, 1).astype("uint8")
    canvas = Image.fromarray(grown)
    ImageDraw.Draw(canvas).rectangle(
        (0, query * scale, canvas.width - 1, (query + 1) * scale - 1), outline=QUERY, width=2)
    return np.asarray(canvas)


def _tile_grid(place: Place) -> Any:
    """Int [frames, height, width]: the tile of each token of the grid."""
    ids = np.repeat(np.arange(place.tiles.blocks), place.tiles.lengths.long().numpy())
    member = np.empty_like(ids)
    member[place.tiles.order.numpy()] = ids
    first = place.layout.before
    return member[first:first + place.layout.grid_tokens].reshape(place.layout.grid)


def _grow(cells: Any, height: int, width: int) -> Any:
    rows = np.arange(height) * cells.shape[0] // height
    columns = np.arange(width) * cells.shape[1] // width
    return cells[rows][:, columns]


def _over(base: Any, cells: Any, heat: bool) -> Any:
    grey = base.mean(-1, keepdims=True)
    value = cells[..., None]
    if heat:
        mixed = 0.3 * grey + 0.7 * _heat(cells)
    else:
        kept = 0.5 * base + 0.5 * np.array(KEPT, float)
        mixed = value * kept + (1 - value) * 0.35 * grey
    return np.clip(mixed, 0, 255).round().astype("uint8")


def _heat(values: Any) -> Any:
    place = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    rest = (place - low)[..., None]
    return _HEAT[low] * (1 - rest) + _HEAT[low + 1] * rest


def _blue(values: Any) -> Any:
    value = np.clip(values, 0, 1)[..., None]
    return (1 - value) * np.array((28, 35, 48), float) + value * np.array(KEPT, float)


def _outline(draw: Any, inside: Any, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """A line around the cells that are `inside`."""
    rows, columns = inside.shape
    (left, top), (height, width) = corner, size

    def point(row: int, column: int) -> tuple[int, int]:
        return left + round(column * width / columns), top + round(row * height / rows)

    padded = np.pad(inside, 1)
    for row, column in zip(*np.nonzero(inside), strict=True):
        around = padded[row:row + 3, column:column + 3]
        edges = ((around[0, 1], (row, column), (row, column + 1)),
                 (around[2, 1], (row + 1, column), (row + 1, column + 1)),
                 (around[1, 0], (row, column), (row + 1, column)),
                 (around[1, 2], (row, column + 1), (row + 1, column + 1)))
        for neighbour, begin, end in edges:
            if not neighbour:
                draw.line((point(*begin), point(*end)), fill=QUERY, width=3)
