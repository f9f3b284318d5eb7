"""Encoded pictures of one size on the device, for `tiny-image`."""

import torch
from torch import Tensor

from .data import Batch, render
from .image_models import CHANNELS, encode_prompts
from .image_state import ImageState
from .lean_codec import LeanCodec
from .progress import autocast
from .ring import Ring
from .scenes import SceneSource
from .text import EOS, TOKENS


class ImageBank(Ring):
    """Latents [N, 16, E / 8, E / 8] of E x E pictures with their captions' ids and outputs."""

    def __init__(
        self, edge: int, config: dict, state: ImageState, source: SceneSource, codec: LeanCodec,
        sprites: Tensor,
    ):
        super().__init__(
            "pictures", source, state.device, config["bank"], config["encode_batch"])
        self.edge, self.state, self.sprites, self.codec = edge, state, sprites, codec
        device, text, cells = state.device, state.config["text"], edge // 8
        kind = {"device": device, "dtype": torch.bfloat16}
        self.latents = torch.empty(self.capacity, CHANNELS, cells, cells, **kind)
        self.hidden = torch.empty(self.capacity, TOKENS, text["dim"], **kind)
        self.pooled = torch.empty(self.capacity, text["pooled_dim"], **kind)
        self.ids = torch.zeros(self.capacity, TOKENS, dtype=torch.int64, device=device)
        self.empty_ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
        self.empty_ids[0, 0] = EOS
        with torch.no_grad():
            self.empty = encode_prompts(state.text, state.clip, self.empty_ids)

    def encode(self, scenes: Batch, ids: Tensor, rows: slice) -> None:
        with autocast(self.device):
            frames = render(scenes, self.sprites, self.edge)[:, 0]
            moments = self.codec.encode(frames)
        self.latents[rows] = moments[:, :CHANNELS].to(torch.bfloat16)
        hidden, pooled = encode_prompts(self.state.text, self.state.clip, ids)
        self.ids[rows] = ids
        self.hidden[rows], self.pooled[rows] = hidden.bfloat16(), pooled.bfloat16()

    @torch.no_grad()
    def sample(self, n: int, padded: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, token outputs and pooled vectors; one caption in ten is the empty one."""
        device = self.latents.device
        index = torch.randint(self.filled, (n,), device=device)
        drop = torch.rand(n, device=device) < 0.1
        if padded != TOKENS:
            ids = torch.where(drop[:, None], self.empty_ids, self.ids[index])
            hidden, pooled = encode_prompts(self.state.text, self.state.clip, ids, padded)
            return self.latents[index], hidden, pooled
        hidden = torch.where(drop[:, None, None], self.empty[0], self.hidden[index].float())
        pooled = torch.where(drop[:, None], self.empty[1], self.pooled[index].float())
        return self.latents[index], hidden, pooled
