"""The one error style: a line on stderr, and an exit code."""

import difflib
from types import FrameType
from typing import Any

BAD_INPUT, UNEXPECTED, STOPPED, TERMINATED = 2, 1, 130, 143

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
_MEMORY_ADVICE = (
    "out of memory: try a smaller --size, fewer --frames, --dtype bfloat16, or on a GPU --offload"
)


class InputError(Exception):
    """What the user asked for cannot be done; the text says what can."""


class Terminated(SystemExit):
    """SIGTERM, on its way through all that cleans up."""


def terminate(number: int, frame: FrameType | None) -> None:
    """A signal handler: end as after Ctrl-C."""
    raise Terminated(TERMINATED)


def nearest(word: str, known: list[str]) -> str:
    """A sentence part that names the nearest accepted words."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Accepted: {', '.join(known)}"


def report(error: BaseException) -> int:
    """Print one line about `error` to stderr; the exit code to leave with."""
    from rich.console import Console
    from rich.text import Text

    message, code = explain(error)
    if not message:
        # a bare `fastdiff` has already printed its help
        return code
    stopped = code in (STOPPED, TERMINATED)
    line = Text("stopped: " if stopped else "error: ", "bold red") + Text(message)
    Console(stderr=True, soft_wrap=True).print(line)
    return code


def explain(error: BaseException) -> tuple[str, int]:
    """The line, and the exit code."""
    stopped = _interrupted(error)
    if stopped is not None:
        return "no unfinished file is left", stopped
    usage: Any = getattr(error, "format_message", None)
    if usage is not None:
        return one_line(usage()), BAD_INPUT
    if out_of_memory(error):
        return _MEMORY_ADVICE, BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        where = f": {str(error.filename)!r}" if error.filename else ""
        return f"{error.strerror}{where}", BAD_INPUT
    text = one_line(str(error)) or type(error).__name__
    known = (InputError, ValueError, OSError, ImportError)
    if isinstance(error, known) or type(error).__name__ == "DenseFallbackError":
        return text, BAD_INPUT
    return f"{type(error).__name__}: {text} (unexpected; --traceback shows where)", UNEXPECTED


def _interrupted(error: BaseException | None) -> int | None:
    """The code of Ctrl-C or SIGTERM, also where a library that was being imported made another
    error of it."""
    # a chain of causes may come back to where it began
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Terminated):
            return TERMINATED
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
            return STOPPED
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _NO_MEMORY)


def one_line(text: str) -> str:
    """All of it on one line, cut at 500 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 500 else f"{flat[:497]}..."
