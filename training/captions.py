"""The words of the training world: objects, colours, motions, captions, held-out pairs."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
OBJECTS: list[dict] = json.loads((DATA / "objects.json").read_text())
NAMES: list[str] = [row["name"] for row in OBJECTS]
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.08),
    "yellow": (1.00, 0.88, 0.18),
    "green": (0.16, 0.60, 0.22),
    "blue": (0.12, 0.30, 0.88),
    "purple": (0.46, 0.16, 0.68),
    "pink": (1.00, 0.62, 0.78),
    "brown": (0.42, 0.25, 0.12),
    "black": (0.05, 0.05, 0.06),
    "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.51),
    "cyan": (0.30, 0.86, 0.92),
}
COLOUR_NAMES: list[str] = list(COLOURS)
PATTERNS: list[str] = ["plain", "gradient", "striped", "dotted"]
MOTIONS: list[str] = [
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "spinning",
    "growing",
    "not moving",
]
MOTION_FORMS: dict[str, list[str]] = {
    "moving left": ["moving left", "moving left", "moving to the left"],
    "moving right": ["moving right", "moving right", "moving to the right"],
    "moving up": ["moving up", "moving up", "moving upwards"],
    "moving down": ["moving down", "moving down", "moving downwards"],
    "bouncing": ["bouncing", "bouncing", "bouncing up and down"],
    "spinning": ["spinning", "spinning", "turning around"],
    "growing": ["growing", "growing", "getting bigger"],
    "not moving": ["not moving", "not moving", "standing still"],
}
COLUMNS = ("left", "center", "right")
ROWS = ("top", "center", "bottom")
STILL_PREFIXES = ("a picture of", "a picture of", "an image of", "a photo of")
CLIP_PREFIXES = ("a video of", "a video of", "a clip of")


@dataclass(frozen=True)
class Scene:
    """What a caption can say; `motion` is None for a picture, `place` None where not asked for."""

    obj: int
    colour: int
    pattern: int = 0
    motion: int | None = None
    place: tuple[int, int] | None = None


def held_out(obj: int, colour: int) -> bool:
    """Whether this object-background pair is kept out of training (one pair in eight)."""
    return (3 * obj + 5 * colour + obj // 8) % 8 == 0


def held_out_pairs() -> list[tuple[int, int]]:
    return [(o, c) for o in range(len(NAMES)) for c in range(len(COLOURS)) if held_out(o, c)]


def place_phrase(place: tuple[int, int]) -> str:
    """`(column, row)` as words, such as "at the top left"."""
    column, row = COLUMNS[place[0]], ROWS[place[1]]
    if column == row == "center":
        return "in the center"
    if column == "center":
        return f"at the {row}"
    return f"on the {column}" if row == "center" else f"at the {row} {column}"


def with_article(noun: str) -> str:
    if noun == "grapes":
        return "some grapes"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plain_caption(scene: Scene) -> str:
    """The canonical wording, used for evaluation and examples."""
    parts = [with_article(NAMES[scene.obj])]
    if scene.motion is not None:
        parts.append(MOTIONS[scene.motion])
    if scene.place is not None:
        parts.append(place_phrase(scene.place))
    pattern = "" if scene.pattern == 0 else PATTERNS[scene.pattern] + " "
    ground = f"{pattern}{COLOUR_NAMES[scene.colour]} background"
    parts.append(f"on {'an' if ground[0] in 'aeiou' else 'a'} {ground}")
    return " ".join(parts)


def caption(scene: Scene, rng: random.Random) -> str:
    """One wording out of the grammar; the pattern is always named unless plain."""
    row = OBJECTS[scene.obj]
    noun = row["name"]
    if row["synonyms"] and rng.random() < 0.25:
        noun = rng.choice(row["synonyms"])
    words = PATTERNS[scene.pattern]
    if scene.pattern == 0 and rng.random() < 0.85:
        words = ""
    ground = f"{words} {COLOUR_NAMES[scene.colour]} background".strip()
    motion = None
    if scene.motion is not None and rng.random() < 0.96:
        motion = rng.choice(MOTION_FORMS[MOTIONS[scene.motion]])
    place = place_phrase(scene.place) if scene.place is not None else None
    if rng.random() < 0.15:
        return ", ".join(p for p in (noun, motion, place, ground) if p)
    article = "an" if ground[0] in "aeiou" else "a"
    parts = [with_article(noun), motion, place, f"on {article} {ground}"]
    if rng.random() < 0.25:
        parts.insert(0, rng.choice(STILL_PREFIXES if scene.motion is None else CLIP_PREFIXES))
    return " ".join(p for p in parts if p)
