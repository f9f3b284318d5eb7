"""Write a benchmark's result file: what ran, on what, when, and the rows."""

import json
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> dict[str, Any]:
    """The device that ran and the versions of what ran on it."""
    found: dict[str, Any] = {"type": device, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1),
                  "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    else:
        found["name"] = _cpu_name()
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80 of repeated times."""
    ordered = sorted(seconds)
    at = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    return {"seconds": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8),
            "repeats": len(ordered)}


def share(error: float, allowed: float) -> float:
    """Error over what is allowed, 0 to 1: of nothing it is 0. AssertionError where it is more."""
    # not >, so that NaN is more
    if not error <= allowed:
        raise AssertionError(f"error {error:.3g}, allowed {allowed:.3g}")
    return error / allowed if allowed else 0.0


def write(path: Path, benchmark: str, device: str, settings: dict, rows: list[dict]) -> None:
    """Atomically write one result file.

    Where settings["model"] is a shipped model, its hash goes in, so that a later version shows.
    """
    from fastdiff import models

    model = settings.get("model")
    if isinstance(model, str) and model in models.shipped():
        settings = {**settings, "sha256": models.find(model).sha256}
    content = {"benchmark": benchmark, "created": datetime.now(UTC).isoformat(timespec="seconds"),
               "device": machine(device), "versions": versions(), "settings": settings,
               "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".part") as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    os.chmod(path, 0o644)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
