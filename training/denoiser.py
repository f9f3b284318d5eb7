"""The Wan denoiser over its genuine weights: a lean training forward and the flow-matching loss."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from .text import TOKENS
from .times import draw_sigmas

PADDED_LENGTHS = (32, 32, 32, 64, 128, 226, 512, 512)
"""Padded prompt lengths seen in training, drawn per caption."""

_LENGTH_TABLES: dict[torch.device, Tensor] = {}


def build_denoiser(config: dict, text_dim: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config["heads"],
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=text_dim,
        freq_dim=256,
        ffn_dim=config["ffn_dim"],
        num_layers=config["layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    # start as the identity: no block writes to the stream, and the output is small
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    torch.nn.init.zeros_(model.proj_out.bias)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    return model


def pad_bias(lengths: Tensor, padded: Tensor) -> Tensor:
    """Logit bias [B, 1, 1, TOKENS] that makes the free slots weigh as `padded - length` tokens.

    Padding embeddings are zeros after the encoder, so all padding keys and values are equal and
    n of them weigh exactly as one with log n added to its logit.
    """
    slots = torch.arange(TOKENS, device=lengths.device)
    free = (TOKENS - lengths).clamp_min(1)
    weight = torch.log((padded - lengths).clamp_min(1).float() / free.float())
    bias = torch.where(slots[None] >= lengths[:, None], weight[:, None], 0.0)
    return bias[:, None, None, :]


def block_weights(block: torch.nn.Module) -> list[Tensor]:
    """The tensors of one layer in the order `block_forward` takes them."""
    a, c = block.attn1, block.attn2
    up, down = block.ffn.net[0].proj, block.ffn.net[2]
    linears = [a.to_q, a.to_k, a.to_v, a.to_out[0], c.to_q, c.to_k, c.to_v, c.to_out[0], up, down]
    weights = [t for linear in linears for t in (linear.weight, linear.bias)]
    norms = [a.norm_q.weight, a.norm_k.weight, c.norm_q.weight, c.norm_k.weight]
    return [*weights, *norms, block.norm2.weight, block.norm2.bias, block.scale_shift_table]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=eps)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs of x [B, S, H, D]; cos and sin are [S, 1, D / 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def block_forward(
    x: Tensor,
    text: Tensor,
    shifts: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor,
    eps: float,
    weights: list[Tensor],
) -> Tensor:
    """One layer on x [B, S, C] with text [B, TOKENS, C] and modulation [B, 6, C]."""
    (wq, bq, wk, bk, wv, bv, wo, bo, cwq, cbq, cwk, cbk, cwv, cbv, cwo, cbo, wu, bu, wd, bd) = (
        weights[:20]
    )
    nq, nk, cnq, cnk, n2w, n2b, table = weights[20:]
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (table + shifts.float()).chunk(6, 1)
    h = (_norm(x, eps) * (1 + scale) + shift).to(x.dtype)
    query = _rotate(_rms(_linear(h, wq, bq), nq, eps).unflatten(-1, (-1, 64)), cos, sin)
    key = _rotate(_rms(_linear(h, wk, bk), nk, eps).unflatten(-1, (-1, 64)), cos, sin)
    value = _linear(h, wv, bv).unflatten(-1, (-1, 64))
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    out = _linear(out.transpose(1, 2).flatten(2), wo, bo)
    x = (x.float() + out.float() * gate).to(x.dtype)

    h = (_norm(x, eps) * n2w + n2b).to(x.dtype)
    query = _rms(_linear(h, cwq, cbq), cnq, eps).unflatten(-1, (-1, 64)).transpose(1, 2)
    key = _rms(_linear(text, cwk, cbk), cnk, eps).unflatten(-1, (-1, 64)).transpose(1, 2)
    value = _linear(text, cwv, cbv).unflatten(-1, (-1, 64)).transpose(1, 2)
    logits = (query @ key.transpose(-1, -2)).float() / 8.0 + bias
    out = torch.softmax(logits, -1).to(x.dtype) @ value
    x = x + _linear(out.transpose(1, 2).flatten(2), cwo, cbo)

    h = (_norm(x, eps) * (1 + ff_scale) + ff_shift).to(x.dtype)
    h = _linear(F.gelu(_linear(h, wu, bu), approximate="tanh"), wd, bd)
    return (x.float() + h.float() * ff_gate).to(x.dtype)


class LeanDenoiser:
    """Velocity in patch space from latents, with the layers optionally compiled."""

    def __init__(self, model: WanTransformer3DModel, compiler: Callable | None = None):
        self.model = model
        self.block = compiler(block_forward) if compiler is not None else block_forward
        self.rotary: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = tuple(latents.shape[2:])
        if shape not in self.rotary:
            cos, sin = self.model.rope(latents)
            halves = (t[0, :, :, 0::2].float().contiguous() for t in (cos, sin))
            self.rotary[shape] = tuple(halves)
        return self.rotary[shape]

    def __call__(
        self, latents: Tensor, sigma: Tensor, text: Tensor, bias: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Velocity patches [B, S, 64] of latents [B, 16, T, H, W] at sigma [B] in [0, 1]."""
        model = self.model
        cos, sin = self._rotary(latents)
        embed = model.patch_embedding
        x = _linear(patches(latents, "input").to(dtype), embed.weight.flatten(1), embed.bias)
        cond = model.condition_embedder
        temb = cond.time_embedder(cond.timesteps_proj(sigma * 1000.0))
        shifts = cond.time_proj(F.silu(temb)).unflatten(1, (6, -1))
        text = cond.text_embedder(text.float()).to(dtype)
        for block in model.blocks:
            x = self.block(x, text, shifts, cos, sin, bias, model.config.eps, block_weights(block))
        shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, 1)
        x = (_norm(x, model.config.eps) * (1 + scale) + shift).to(dtype)
        return _linear(x, model.proj_out.weight, model.proj_out.bias)


def patches(latents: Tensor, order: str) -> Tensor:
    """[B, C, T, H, W] to [B, T * H/2 * W/2, 4 C], channels first ("input") or last ("output")."""
    x = latents.unflatten(3, (-1, 2)).unflatten(5, (-1, 2))
    dims = (0, 2, 3, 5, 1, 4, 6) if order == "input" else (0, 2, 3, 5, 4, 6, 1)
    return x.permute(*dims).flatten(4).flatten(1, 3)


def flow_loss(
    denoiser: LeanDenoiser,
    latents: Tensor,
    text: Tensor,
    lengths: Tensor,
    shift: float,
    dtype: torch.dtype,
    tail: float = 0.0,
) -> Tensor:
    """Flow-matching loss: x_s = (1 - s) x + s noise, target noise - x, s by `draw_sigmas`."""
    b = latents.shape[0]
    device = latents.device
    x = latents.float()
    noise = torch.randn_like(x)
    sigma = draw_sigmas(b, shift, tail, device)
    s = sigma.view(-1, 1, 1, 1, 1)
    if device not in _LENGTH_TABLES:
        _LENGTH_TABLES[device] = torch.tensor(PADDED_LENGTHS, device=device)
    table = _LENGTH_TABLES[device]
    padded = table[torch.randint(len(PADDED_LENGTHS), (b,), device=device)]
    out = denoiser((1 - s) * x + s * noise, sigma, text, pad_bias(lengths, padded), dtype)
    return F.mse_loss(out.float(), patches(noise - x, "output"))


def sigma_schedule(steps: int, shift: float) -> list[float]:
    """The sigmas of a shifted Euler schedule from 1 to 0, for quick previews."""
    line = [1 - i / steps for i in range(steps)] + [0.0]
    return [shift * s / (1 + (shift - 1) * s) for s in line]


def parameter_megabytes(model: torch.nn.Module) -> float:
    return math.fsum(p.numel() for p in model.parameters()) * 2 / 1e6
