"""Scenes with tokenised captions, drawn by worker processes while the device trains."""

import random
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from multiprocessing import get_context

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .captions import caption
from .data import Batch, concat, make_batch, random_scene
from .text import TOKENS

Chunk = dict[str, np.ndarray]


def draw_chunk(seed: int, n: int, frames: int, tokenizer_json: str) -> Chunk:
    """`n` training scenes of `frames` frames with one caption each, as arrays."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    scenes = [random_scene(rng, clip=frames > 1) for _ in range(n)]
    batch = make_batch(scenes, rng, frames, frames)
    chunk = {f.name: getattr(batch, f.name).numpy() for f in fields(Batch)}
    rows = Tokenizer.from_str(tokenizer_json).encode_batch([caption(s, rng) for s in scenes])
    ids = np.zeros((n, TOKENS), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids[:TOKENS]
    chunk["ids"] = ids
    return chunk


class SceneSource:
    """Chunks of pictures and clips, kept a fixed number ahead of their use."""

    def __init__(self, config: dict, tokenizer_json: str, seed: int, clip_frames: int):
        self.clip_frames = clip_frames
        self.sizes = {"pictures": config["picture_chunk"], "clips": config["clip_chunk"]}
        self.ahead = {"pictures": config["picture_ahead"], "clips": config["clip_ahead"]}
        self.tokenizer_json = tokenizer_json
        self.seed = seed
        workers = config["workers"]
        self.pool = None
        if workers:
            self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        self.waiting: dict[str, list[Future]] = {"pictures": [], "clips": []}
        for kind in self.waiting:
            for _ in range(self.ahead[kind] if self.pool else 0):
                self._submit(kind)

    def _arguments(self, kind: str) -> tuple[int, int, int, str]:
        self.seed += 1
        frames = 1 if kind == "pictures" else self.clip_frames
        return self.seed, self.sizes[kind], frames, self.tokenizer_json

    def _submit(self, kind: str) -> None:
        self.waiting[kind].append(self.pool.submit(draw_chunk, *self._arguments(kind)))

    def _drawn(self, kind: str) -> Chunk:
        """The oldest chunk of the workers; drawn here from now on if they have died."""
        try:
            chunk = self.waiting[kind].pop(0).result()
            self._submit(kind)
            return chunk
        except BrokenProcessPool:
            print("scene workers died; drawing in this process", flush=True)
            self.pool = None
            return draw_chunk(*self._arguments(kind))

    def next(self, kind: str, device: torch.device) -> tuple[Batch, Tensor]:
        """The next chunk on `device`: scenes and token ids [n, TOKENS]."""
        inline = self.pool is None
        chunk = draw_chunk(*self._arguments(kind)) if inline else self._drawn(kind)
        tensors = {k: torch.from_numpy(v).to(device) for k, v in chunk.items()}
        ids = tensors.pop("ids")
        return Batch(**tensors), ids

    def pool_of(self, kind: str, chunks: int, device: torch.device) -> Batch:
        """Several chunks together, without captions."""
        return concat([self.next(kind, device)[0] for _ in range(chunks)])

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
