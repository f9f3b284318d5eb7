"""The Flux denoiser in training: a lean forward over its genuine layers, and the loss."""

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from .image_models import image_ids, pack
from .times import draw_sigmas


class LeanJoint:
    """Velocity tokens by the genuine layers; noise levels stay in fp32 under autocast.

    The stock forward rounds them to the type of its input, which hides the levels near one.
    """

    def __init__(self, model: FluxTransformer2DModel):
        self.model = model
        self.rotary: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _rotary(self, text: int, edge: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if (text, edge) not in self.rotary:
            ids = torch.cat([torch.zeros(text, 3, device=device), image_ids(edge, device)])
            cos, sin = self.model.pos_embed(ids)
            self.rotary[text, edge] = cos.float(), sin.float()
        return self.rotary[text, edge]

    def __call__(
        self, tokens: Tensor, sigma: Tensor, hidden: Tensor, pooled: Tensor, edge: int
    ) -> Tensor:
        """[B, S, 64] of tokens [B, S, 64] at sigma [B]; `edge` is in latent cells."""
        model = self.model
        rotary = self._rotary(hidden.shape[1], edge, tokens.device)
        image = model.x_embedder(tokens)
        temb = model.time_text_embed(sigma.float() * 1000, pooled.float())
        text = model.context_embedder(hidden)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=temb,
                image_rotary_emb=rotary,
            )
        return model.proj_out(model.norm_out(image, temb))


def compile_layers(model: FluxTransformer2DModel) -> None:
    """Compile each layer on its first call; `torch.compiler.set_stance` switches that off."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(dynamic=False)


def joint_loss(
    joint: LeanJoint, latents: Tensor, hidden: Tensor, pooled: Tensor, shift: float, tail: float
) -> Tensor:
    """Flow-matching loss on latents [B, 16, H, W]: target noise - x at s x noise + (1 - s) x x."""
    x = pack(latents.float())
    noise = torch.randn_like(x)
    sigma = draw_sigmas(len(x), shift, tail, x.device)
    s = sigma.view(-1, 1, 1)
    out = joint((1 - s) * x + s * noise, sigma, hidden, pooled, latents.shape[-1])
    return F.mse_loss(out.float(), noise - x)
