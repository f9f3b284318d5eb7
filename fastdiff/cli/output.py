"""Where results go and how they are written: names, atomic files, PNG, MP4, side by side."""

import errno
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.cli.errors import InputError

SUFFIX = {"video": ".mp4", "image": ".png"}
_GAP, _STRIP = 8, 24
# errors of the disk, not of a file
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@dataclass(frozen=True)
class Place:
    """Where one result goes. stem: None for a name made of prompt and seed.

    suffix: as it was typed, such as ".PNG"; None is that of the kind.
    """

    folder: Path
    stem: str | None = None
    overwrite: bool = False
    suffix: str | None = None

    def path(self, kind: str, prompt: str, seed: int, used: Set[Path] = frozenset()) -> Path:
        """The file to write: with `overwrite` the name as asked, else the next free one.

        used: files of this call, which are never written twice.
        """
        stem, suffix = self.stem or f"{slug(prompt)}-seed{seed}", self.suffix or SUFFIX[kind]
        number = 1
        while True:
            path = self.folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
            taken = (path, sidecar_of(path), beside(path, "stock"), beside(path, "compare"))
            free = self.overwrite or not any(map(os.path.lexists, taken))
            if free and path not in used:
                return path
            number += 1


def places(output: Path | None, prompts: int, overwrite: bool) -> tuple[list[Place], str | None]:
    """A place for each prompt, and the kind if the file name says it. Checks that it can write."""
    if output is None or output.is_dir():
        return [Place(writable(output or Path()), overwrite=overwrite)] * prompts, None
    kinds = {suffix: kind for kind, suffix in SUFFIX.items()}
    kind = kinds.get(output.suffix.lower())
    if prompts > 1 or str(output).endswith(os.sep):
        if kind is not None:
            raise InputError(f"{str(output)!r} is one file, but there are {prompts} prompts: "
                             "give a folder")
        writable(output.parent)
        output.mkdir(exist_ok=True)
        return [Place(writable(output), overwrite=overwrite)] * prompts, None
    if output.suffix and kind is None:
        raise InputError(f"cannot write {output.suffix!r} files: accepted are "
                         f"{' and '.join(kinds)}")
    stem, suffix = (output.stem, output.suffix) if kind else (output.name, None)
    return [Place(writable(output.parent), stem, overwrite, suffix)], kind


def slug(prompt: str, length: int = 48) -> str:
    """A file name part: the words of the prompt."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:length].rstrip("-_") or "untitled"


def beside(path: Path, what: str) -> Path:
    """The companion file of a comparison."""
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


def sidecar_of(path: Path) -> Path:
    """`apple.mp4` has `apple.mp4.json`, so a picture and a clip of one name keep theirs apart."""
    return path.with_name(f"{path.name}.json")


def writable(folder: Path) -> Path:
    """The folder, if a file can be made in it; an InputError that says why not."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"the folder {str(folder)!r} {what}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write in {str(folder)!r}: {error.strerror}") from None
    return folder


@contextmanager
def atomic(path: Path, new: bool = False) -> Iterator[Path]:
    """A file to fill; it takes the name `path` only when complete and on disk.

    new: raise FileExistsError where another process took the name meanwhile.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        if new:
            _take(path, part)
        else:
            os.replace(part, path)
    except OSError as error:
        if error.errno in _DISK:
            error.filename = str(path.parent)
        raise
    finally:
        part.unlink(missing_ok=True)


def _take(path: Path, part: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(part, path)


def write(
    path: Path, frames: Any, fps: int, about: dict[str, Any], new: bool = False
) -> None:
    """Write float [F, H, W, 3] in 0..1 as MP4, or its first frame as PNG, with `about` inside.

    new: as of `atomic`.
    """
    pixels = to_bytes(frames)
    text = json.dumps(without_tables(about), ensure_ascii=False, sort_keys=True)
    with atomic(path, new) as part:
        if path.suffix.lower() == SUFFIX["image"]:
            _write_png(part, pixels[0], about, text)
        else:
            _write_mp4(part, pixels, fps, text)


def without_tables(about: dict[str, Any]) -> dict[str, Any]:
    """`about` without what a calibration found: too long for a video's comment. Sidecars keep it.
    """
    plan = about.get("plan")
    if not plan:
        return about
    methods = [{k: v for k, v in method.items() if k != "calibration"}
               for method in plan["methods"]]
    return {**about, "plan": {**plan, "methods": methods}}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_bytes(frames: Any) -> Any:
    """uint8 of float in 0..1."""
    return (frames * 255).round().clip(0, 255).astype("uint8")


def _write_png(path: Path, pixels: Any, about: dict[str, Any], text: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", str(about.get("prompt", "")))
    info.add_itxt("fastdiff", text)
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=info)


def _write_mp4(path: Path, pixels: Any, fps: int, text: str) -> None:
    import imageio_ffmpeg

    # H.264 in yuv420p has even sides; the last row or column is repeated where it must
    pixels = _pad_even(pixels)
    height, width = pixels.shape[1:3]
    # imageio's own writer does not look at ffmpeg's exit code: a clip cut off by a full disk would
    # pass for whole. An absolute path, as "a:b.mp4" would be read as a protocol. A process group
    # of its own, so that Ctrl-C does not cut off a clip either.
    ended = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo",
         "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an",
         "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "15", "-movflags", "+faststart",
         "-metadata", f"comment={text}", str(path.absolute())],
        input=pixels.data.cast("B"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        process_group=0, check=False,
    )
    if ended.returncode:
        raise _failed(path, ended.returncode, ended.stderr.decode(errors="replace"))


def _failed(path: Path, code: int, told: str) -> Exception:
    """Why ffmpeg broke off: an OSError where the disk was the cause."""
    for number in _DISK:
        if os.strerror(number) in told:
            return OSError(number, os.strerror(number), str(path.parent))
    last = told.strip().splitlines()[-1:] or [f"code {code}" if code > 0 else f"signal {-code}"]
    return InputError(f"ffmpeg broke off ({last[0]}); `fastdiff doctor` checks it")


def _pad_even(pixels: Any) -> Any:
    import numpy as np

    height, width = pixels.shape[1:3]
    if height % 2 == width % 2 == 0:
        return np.ascontiguousarray(pixels)
    return np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def check_ffmpeg() -> None:
    """Raise where no clip could be written."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise InputError(f"clips need ffmpeg: pip install imageio-ffmpeg ({error})") from None


def psnr(one: Any, two: Any) -> float:
    """Peak signal-to-noise ratio in dB of two float arrays in 0..1; inf when equal."""
    error = float(((one.astype("float64") - two.astype("float64")) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def side_by_side(left: Any, right: Any, captions: tuple[str, str]) -> Any:
    """Float [F, H + strip, 2 W + gap, 3]: both, with a caption over each."""
    import numpy as np

    frames, height, width = left.shape[:3]
    canvas = np.ones((frames, height + _STRIP, 2 * width + _GAP, 3), dtype="float32")
    canvas[:, _STRIP:, :width] = left
    canvas[:, _STRIP:, width + _GAP:] = right
    canvas[:, :_STRIP, :width] = _caption(captions[0], width)
    canvas[:, :_STRIP, width + _GAP:] = _caption(captions[1], width)
    return canvas


def _caption(text: str, width: int) -> Any:
    import numpy as np
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, _STRIP), "white")
    ImageDraw.Draw(strip).text((4, 6), text, fill="black")
    return np.asarray(strip, dtype="float32") / 255
