"""Batched renderer: RGBA sprites over procedural backgrounds, pictures and clips, on any device."""

import random
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .captions import COLOURS, DATA, MOTIONS, OBJECTS, Scene, held_out

SPRITE = 160
MIPS = (160, 112, 80)
PATTERN_WEIGHTS = (0.52, 0.16, 0.16, 0.16)
BOUNCES = 1.5
_COLOUR_TABLES: dict[torch.device, Tensor] = {}


@dataclass
class Batch:
    """Scenes as tensors: indices [B], tracks [B, T] in frame units, background noise [B, 8]."""

    obj: Tensor
    colour: Tensor
    pattern: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    angle: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def __len__(self) -> int:
        return len(self.obj)

    def __getitem__(self, index: Tensor | slice) -> "Batch":
        return Batch(*(getattr(self, f.name)[index] for f in fields(self)))

    def window(self, start: int, frames: int) -> "Batch":
        """The same scenes for `frames` frames from `start`."""
        cut = {k: getattr(self, k)[:, start : start + frames] for k in ("x", "y", "size", "angle")}
        return replace(self, **cut)

    def fresh_noise(self) -> "Batch":
        return replace(self, noise=torch.rand_like(self.noise))


def concat(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(b, f.name) for b in batches]) for f in fields(Batch)))


def _tight(image: Image.Image, edge: int) -> tuple[Image.Image, float]:
    """The sprite cut to its visible square with a small margin, so that sizes mean the same.

    Returns it at `edge` pixels with the factor it was enlarged by.
    """
    left, top, right, bottom = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    own = max(right - left, bottom - top) + 6
    x, y = (left + right - own) // 2, (top + bottom - own) // 2
    cut = image.crop((x, y, x + own, y + own))
    return cut.resize((edge, edge), Image.Resampling.LANCZOS), edge / own


def _crisp(sprite: Tensor, enlarged: float) -> Tensor:
    """A premultiplied sprite [4, E, E] whose outline is as sharp as before it was enlarged."""
    alpha = sprite[3:]
    colour = sprite[:3] / alpha.clamp_min(1e-3)
    alpha = ((alpha - 0.5) * max(1.0, 0.8 * enlarged) + 0.5).clamp(0, 1)
    return torch.cat([(colour * alpha).clamp(0, 1), alpha])


def load_sprites(device: torch.device | str, edge: int = SPRITE) -> Tensor:
    """Premultiplied sprites [mips, objects, 4, edge, edge]; later mips are blurred."""
    rows = []
    for row in OBJECTS:
        path = DATA / "sprites" / row["file"]
        image, enlarged = _tight(Image.open(path).convert("RGBA"), edge)
        sprite = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        sprite = torch.cat([sprite[:3] * sprite[3:], sprite[3:]])
        rows.append(_crisp(sprite, enlarged) if edge > SPRITE else sprite)
    sprites = torch.stack(rows)
    levels = [sprites]
    for small in MIPS[1:]:
        low = F.interpolate(sprites, size=round(edge * small / SPRITE), mode="area")
        levels.append(F.interpolate(low, size=edge, mode="bilinear", align_corners=False))
    return torch.stack(levels).to(device)


def _axis(rng: random.Random, slot: int | None, half: float) -> float:
    """A coordinate in [half, 1 - half], within third `slot` (0, 1, 2) if one is asked for."""
    low, high = half + 0.01, 0.99 - half
    if slot is None:
        return rng.uniform(low, high)
    if slot == 1:
        return rng.uniform(0.46, 0.54)
    near = rng.uniform(low, min(low + 0.10, 0.40))
    return near if slot == 0 else 1 - near


def _track(
    scene: Scene, rng: random.Random, phase: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y (downwards), size and angle over `phase` in [0, 1], all in frame units."""
    motion = None if scene.motion is None else MOTIONS[scene.motion]
    one = np.ones_like(phase)
    size = rng.uniform(0.35, 0.60) if motion in (None, "spinning", "not moving") else 0.0
    size = size or rng.uniform(0.35, 0.45)
    tilt = rng.uniform(-0.18, 0.18) if rng.random() < 0.5 else 0.0
    column, row = scene.place if scene.place is not None else (None, None)
    half = size / 2
    x, y = _axis(rng, column, half) * one, _axis(rng, row, half) * one
    width, angle = size * one, tilt * one
    travel = rng.uniform(0.32, 0.46)
    start = 0.5 - travel / 2 + rng.uniform(-0.04, 0.04)
    if motion == "moving right":
        x = start + travel * phase
    elif motion == "moving left":
        x = 1 - start - travel * phase
    elif motion == "moving down":
        y = start + travel * phase
    elif motion == "moving up":
        y = 1 - start - travel * phase
    elif motion == "bouncing":
        # from the top, at most 9 pixels a frame at 256: four frames share one latent frame
        floor = 0.97 - half
        y = floor - rng.uniform(0.22, 0.30) * np.abs(np.cos(np.pi * BOUNCES * phase))
    elif motion == "spinning":
        angle = tilt + 2 * np.pi * phase
    elif motion == "growing":
        big = rng.uniform(0.55, 0.68)
        width = 0.24 + (big - 0.24) * phase
        x, y = (_axis(rng, column, big / 2) * one, _axis(rng, row, big / 2) * one)
    return x, y, width, angle


def random_scene(
    rng: random.Random, clip: bool, unseen: bool | None = False, place_share: float = 0.45
) -> Scene:
    """A scene of a training pair, of a held-out pair (`unseen`), or of any pair (None)."""
    while True:
        obj, colour = rng.randrange(len(OBJECTS)), rng.randrange(len(COLOURS))
        if unseen is None or held_out(obj, colour) == unseen:
            break
    motion = rng.randrange(len(MOTIONS)) if clip else None
    pattern = rng.choices(range(4), PATTERN_WEIGHTS)[0]
    fixed = motion is None or MOTIONS[motion] in ("spinning", "growing", "not moving")
    share = place_share if not clip else place_share / 2
    place = (rng.randrange(3), rng.randrange(3)) if fixed and rng.random() < share else None
    return Scene(obj, colour, pattern, motion, place)


def make_batch(
    scenes: list[Scene], rng: random.Random, frames: int = 1, duration: int = 33
) -> Batch:
    """Geometry of `frames` consecutive frames; a motion takes `duration` frames in all."""
    phase = np.arange(frames) / max(duration - 1, 1)
    tracks = [_track(scene, rng, phase) for scene in scenes]
    x, y, size, angle = (torch.from_numpy(np.stack(t)).float() for t in zip(*tracks, strict=True))
    noise = torch.tensor([[rng.random() for _ in range(8)] for _ in scenes])
    index = torch.tensor([[s.obj, s.colour, s.pattern] for s in scenes])
    return Batch(*index.unbind(1), x, y, size, angle, noise)


def _background(colour: Tensor, pattern: Tensor, noise: Tensor, edge: int) -> Tensor:
    """Backgrounds [B, 3, edge, edge] in [0, 1]; `colour` is [B, 3], `noise` [B, 8]."""
    axis = (torch.arange(edge, device=colour.device) + 0.5) / edge
    y, x = axis[None, :, None], axis[None, None, :]
    n = noise[:, :, None, None].unbind(1)
    base = colour + (noise[:, 5:8] - 0.5) * 0.05
    light = (colour * colour.new_tensor([0.30, 0.59, 0.11])).sum(1, keepdim=True)
    toward = (light < 0.55).to(colour.dtype)
    accent = base + (toward - base) * 0.24
    sharp = edge / 6.0
    turn = torch.pi * torch.floor(n[0] * 4) / 4
    along = x * torch.cos(turn) + y * torch.sin(turn)
    count = 3.0 + torch.floor(n[1] * 4)
    stripes = torch.sigmoid(sharp * torch.sin(2 * torch.pi * (along * count + n[2])) / count)
    cells = 4.0 + torch.floor(n[1] * 4)
    dx, dy = (x * cells + n[2]) % 1 - 0.5, (y * cells + n[3]) % 1 - 0.5
    dots = torch.sigmoid(sharp * 4 * (0.27 - torch.sqrt(dx * dx + dy * dy)) / cells)
    ramp = torch.where(n[0] < 0.5, y, 1 - y).expand_as(dots) * 1.2
    kind = pattern[:, None, None]
    mix = torch.where(kind == 1, ramp, torch.where(kind == 2, stripes, dots))
    mix = torch.where(kind == 0, torch.zeros_like(mix), mix)[:, None]
    return (base[:, :, None, None] + (accent - base)[:, :, None, None] * mix).clamp(0, 1)


@torch.no_grad()
def render(batch: Batch, sprites: Tensor, edge: int, alpha_only: bool = False) -> Tensor:
    """Frames [B, T, 3, edge, edge] in [-1, 1], or the coverage [B, T, 1, edge, edge] in [0, 1]."""
    device = sprites.device
    batch = batch.to(device)
    x, y, size, angle = batch.x, batch.y, batch.size, batch.angle
    b, frames = x.shape
    ratio = size.amax(1) * edge / sprites.shape[-1]
    level = (torch.where(ratio < 0.44, 2, 1)).where(ratio < 0.72, 0)
    inputs = sprites[level, batch.obj]
    axis = (torch.arange(edge, device=device) + 0.5) / edge
    dx = (axis[None, None, None, :] - x[:, :, None, None]) * (2 / size)[:, :, None, None]
    dy = (axis[None, None, :, None] - y[:, :, None, None]) * (2 / size)[:, :, None, None]
    cos, sin = torch.cos(angle)[:, :, None, None], torch.sin(angle)[:, :, None, None]
    grid = torch.stack([dx * cos + dy * sin, dy * cos - dx * sin], -1)
    out = F.grid_sample(
        inputs, grid.reshape(b, frames * edge, edge, 2), mode="bilinear", align_corners=False
    ).view(b, 4, frames, edge, edge)
    rgb, alpha = out[:, :3], out[:, 3:]
    if alpha_only:
        return alpha.transpose(1, 2)
    if device not in _COLOUR_TABLES:
        _COLOUR_TABLES[device] = torch.tensor(list(COLOURS.values()), device=device)
    colour = _COLOUR_TABLES[device][batch.colour]
    ground = _background(colour, batch.pattern, batch.noise, edge)
    image = ground[:, :, None] * (1 - alpha) + rgb
    return (image * 2 - 1).clamp(-1, 1).transpose(1, 2)
