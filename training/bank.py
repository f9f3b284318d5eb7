"""Encoded scenes of a size on the device: latents and caption embeddings."""

import torch
from torch import Tensor

from .autoencoder import FullSequence
from .data import Batch, render
from .progress import autocast
from .ring import Ring
from .scenes import SceneSource
from .state import State
from .text import EOS, TOKENS, encode_captions


class Bank(Ring):
    """Normalised latents [N, 16, T, H, W], caption outputs [N, TOKENS, D] and lengths [N]."""

    def __init__(
        self, kind: str, state: State, source: SceneSource, model: FullSequence, sprites: Tensor,
        edge: int | None = None, capacity: int | None = None, batch: int | None = None,
    ):
        """edge, capacity and encoded batch: None takes those of the config."""
        config = state.config
        n, device = capacity or config[kind]["bank"], state.device
        super().__init__(kind, source, device, n, batch or config[kind]["encode_batch"])
        self.state, self.model, self.sprites = state, model, sprites
        self.edge = edge or config["edge"]
        frames = 1 if kind == "pictures" else (config["clip_frames"] + 3) // 4
        edge = self.edge // 8
        self.latents = torch.empty(n, 16, frames, edge, edge, dtype=torch.bfloat16, device=device)
        dim = config["text"]["dim"]
        self.text = torch.empty(n, TOKENS, dim, dtype=torch.bfloat16, device=device)
        self.lengths = torch.empty(n, dtype=torch.int64, device=device)
        self.mean, self.std = state.latent_statistics()
        empty = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
        empty[0, 0] = EOS
        self.empty, _ = encode_captions(state.text, empty, empty)

    def encode(self, scenes: Batch, ids: Tensor, rows: slice) -> None:
        with autocast(self.device):
            video = render(scenes, self.sprites, self.edge)
            moments = self.model.encode(video)
        latents = moments[:, :, :16].float().transpose(1, 2)
        self.latents[rows] = ((latents - self.mean) / self.std).to(torch.bfloat16)
        self.text[rows], self.lengths[rows] = encode_captions(
            self.state.text, ids, (ids != 0).long()
        )

    def sample(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, caption outputs and lengths of n rows; one caption in ten is the empty one."""
        index = torch.randint(self.filled, (n,), device=self.latents.device)
        drop = torch.rand(n, device=index.device) < 0.1
        text = torch.where(drop[:, None, None], self.empty, self.text[index])
        return self.latents[index], text, torch.where(drop, 1, self.lengths[index])
