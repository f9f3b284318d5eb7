"""`AutoencoderKL` in training: genuine weights, channels last, norm and SiLU as one function."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .autoencoder import reconstruction_loss


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group norm and SiLU of [N, C, H, W] in fp32, back in the type of `x`."""
    h = x.float().unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(h, (2, 3, 4), correction=0, keepdim=True)
    h = ((h - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    return F.silu(h * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)


class LeanCodec:
    """Encoder and decoder of an `AutoencoderKL` without attention, equal to the stock ones."""

    def __init__(self, vae: AutoencoderKL, compiler: Callable | None = None):
        self.vae = vae
        self.norm_silu = compiler(group_norm_silu) if compiler is not None else group_norm_silu

    def encode(self, frames: Tensor) -> Tensor:
        """Moments [B, 32, H / 8, W / 8] of frames [B, 3, H, W]."""
        encoder = self.vae.encoder
        x = encoder.conv_in(frames.contiguous(memory_format=torch.channels_last))
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            for down in block.downsamplers or ():
                x = down.conv(F.pad(x, (0, 1, 0, 1)))
        x = self._act(encoder.conv_norm_out, self._mid(encoder.mid_block, x))
        return self.vae.quant_conv(encoder.conv_out(x))

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, H, W], not clamped, of latents [B, 16, H / 8, W / 8]."""
        decoder = self.vae.decoder
        x = self.vae.post_quant_conv(latents).contiguous(memory_format=torch.channels_last)
        x = self._mid(decoder.mid_block, decoder.conv_in(x))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            for up in block.upsamplers or ():
                x = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return decoder.conv_out(self._act(decoder.conv_norm_out, x))

    def _act(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return self.norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)

    def _residual(self, block: nn.Module, x: Tensor) -> Tensor:
        short = x if block.conv_shortcut is None else block.conv_shortcut(x)
        x = block.conv1(self._act(block.norm1, x))
        return short + block.conv2(self._act(block.norm2, x))

    def _mid(self, block: nn.Module, x: Tensor) -> Tensor:
        for resnet in block.resnets:
            x = self._residual(resnet, x)
        return x


def codec_loss(codec: LeanCodec, frames: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Training loss and mean squared error (detached) of frames [B, 3, H, W] in [-1, 1]."""
    mean, log_variance = codec.encode(frames).float().chunk(2, 1)
    log_variance = log_variance.clamp(-20, 4)
    latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    back = codec.decode(latents)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = reconstruction_loss(back[:, None], frames[:, None]) + kl_weight * kl
    return loss, F.mse_loss(back.detach().float().clamp(-1, 1), frames)
