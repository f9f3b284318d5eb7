"""What went wrong, as one sentence for the page; no trace and no path reaches the browser."""

import re

from fastdiff.cli import errors

NO_MEMORY = ("out of memory: nothing was made, and the server goes on. Try a smaller size, fewer "
             "frames, or a lower density")


def sentence(error: BaseException) -> tuple[str, bool]:
    """(the sentence, whether the error is a known kind that needs no trace in the log)."""
    if errors.out_of_memory(error):
        return NO_MEMORY, True
    text, code = errors.explain(error)
    if code == errors.UNEXPECTED:
        kind = type(error).__name__
        return f"something unexpected went wrong ({kind}); the server's log has the rest", False
    # the command line's options are fields here, but a command in backticks is to be typed
    return re.sub(r"(`[^`]*`)|(?<!\w)--(?=\w)", lambda found: found[1] or "", text), True
