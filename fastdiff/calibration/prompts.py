"""Prompts of a search where none are given; the measurements in benchmarks/ use none of these."""

from pathlib import Path

DEFAULT = [
    "a red car moving right on a white background",
    "a green cactus growing on a yellow background",
    "a tropical fish moving left on a blue background",
    "a sunflower spinning on a gray background",
]


def prompts(given: str) -> list[str]:
    """The prompts of "default", or of a text file with one a line; lines with # are left out."""
    if given == "default":
        return DEFAULT
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"--prompts {given!r} is neither \"default\" nor a text file with one "
                         "prompt a line") from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ValueError(f"the file {given!r} holds no prompt: give one a line")
    return found
