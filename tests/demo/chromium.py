"""Where a Chromium is."""

import os
import shutil
from pathlib import Path


def chromium() -> str | None:
    """A Chromium to drive: FASTDIFF_CHROMIUM, one on the path, or Playwright's own."""
    named = os.environ.get("FASTDIFF_CHROMIUM")
    found = named or shutil.which("chromium") or shutil.which("google-chrome")
    if found:
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        own = driver.chromium.executable_path
    return own if Path(own).exists() else None
