"""Encoded scenes on the device: latents and caption embeddings, renewed in a ring."""

import time

import torch
from torch import Tensor

from .autoencoder import FullSequence
from .data import Batch, render
from .progress import synchronise
from .scenes import SceneSource
from .state import State
from .text import EOS, TOKENS, encode_captions


class Bank:
    """Normalised latents [N, 16, T, H, W], caption outputs [N, TOKENS, D] and lengths [N]."""

    def __init__(
        self, kind: str, state: State, source: SceneSource, model: FullSequence, sprites: Tensor,
        edge: int | None = None, capacity: int | None = None, batch: int | None = None,
    ):
        """edge, capacity and encoded batch: None takes those of the config."""
        config = state.config
        self.kind, self.state, self.source = kind, state, source
        self.model, self.sprites = model, sprites
        self.batch, self.edge = batch or config[kind]["encode_batch"], edge or config["edge"]
        frames = 1 if kind == "pictures" else (config["clip_frames"] + 3) // 4
        edge, n, device = self.edge // 8, capacity or config[kind]["bank"], state.device
        self.capacity, self.filled, self.cursor = n, 0, 0
        self.latents = torch.empty(n, 16, frames, edge, edge, dtype=torch.bfloat16, device=device)
        dim = config["text"]["dim"]
        self.text = torch.empty(n, TOKENS, dim, dtype=torch.bfloat16, device=device)
        self.lengths = torch.empty(n, dtype=torch.int64, device=device)
        self.mean, self.std = state.latent_statistics()
        empty = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
        empty[0, 0] = EOS
        self.empty, _ = encode_captions(state.text, empty, empty)
        self.rest: tuple[Batch, Tensor] | None = None

    @torch.no_grad()
    def renew(self) -> None:
        """Render and encode the next scenes of the source into the ring."""
        if self.rest is None or len(self.rest[0]) < self.batch:
            self.rest = self.source.next(self.kind, self.state.device)
        scenes, ids = self.rest
        self.rest = (scenes[self.batch :], ids[self.batch :])
        scenes, ids = scenes[: self.batch], ids[: self.batch]
        start = min(self.cursor, self.capacity - self.batch)
        rows = slice(start, start + self.batch)
        device = self.state.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            video = render(scenes, self.sprites, self.edge)
            moments = self.model.encode(video)
        latents = moments[:, :, :16].float().transpose(1, 2)
        self.latents[rows] = ((latents - self.mean) / self.std).to(torch.bfloat16)
        self.text[rows], self.lengths[rows] = encode_captions(
            self.state.text, ids, (ids != 0).long()
        )
        self.filled = max(self.filled, start + self.batch)
        self.cursor = (start + self.batch) % self.capacity

    def fill(self, seconds: float) -> None:
        """Renew until full or out of time."""
        end = time.monotonic() + seconds
        while self.filled < self.capacity:
            self.renew()
            if (self.cursor // self.batch) % 8 == 0:
                synchronise(self.state.device)
                if time.monotonic() >= end:
                    break

    def sample(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, caption outputs and lengths of n rows; one caption in ten is the empty one."""
        index = torch.randint(self.filled, (n,), device=self.latents.device)
        drop = torch.rand(n, device=index.device) < 0.1
        text = torch.where(drop[:, None, None], self.empty, self.text[index])
        return self.latents[index], text, torch.where(drop, 1, self.lengths[index])
