"""Encoded scenes on the device, the oldest of them renewed first."""

import time

import torch
from torch import Tensor

from .data import Batch
from .progress import synchronise
from .scenes import SceneSource


class Ring:
    """`capacity` rows, encoded `batch` at a time; subclasses say what a row is.

    kind: of the scenes that the source is asked for.
    """

    def __init__(
        self, kind: str, source: SceneSource, device: torch.device, capacity: int, batch: int
    ):
        self.kind, self.source, self.device = kind, source, device
        self.capacity, self.batch = capacity, batch
        self.filled = self.cursor = 0
        self.rest: tuple[Batch, Tensor] | None = None

    def encode(self, scenes: Batch, ids: Tensor, rows: slice) -> None:
        """Put these scenes, whose captions are `ids`, into these rows."""
        raise NotImplementedError

    @torch.no_grad()
    def renew(self) -> None:
        """Render and encode the next scenes of the source into the ring."""
        if self.rest is None or len(self.rest[0]) < self.batch:
            self.rest = self.source.next(self.kind, self.device)
        scenes, ids = self.rest
        self.rest = (scenes[self.batch :], ids[self.batch :])
        start = min(self.cursor, self.capacity - self.batch)
        end = start + self.batch
        self.encode(scenes[: self.batch], ids[: self.batch], slice(start, end))
        self.filled = max(self.filled, end)
        self.cursor = end % self.capacity

    def fill(self, seconds: float) -> dict[str, float]:
        """Renew until full or out of time; returns rows, seconds spent and rows a second."""
        begin = time.monotonic()
        while self.filled < self.capacity:
            self.renew()
            if (self.cursor // self.batch) % 8 == 0:
                synchronise(self.device)
                if time.monotonic() >= begin + seconds:
                    break
        spent = time.monotonic() - begin
        return {"rows": self.filled, "spent": spent, "rate": self.filled / spent}
