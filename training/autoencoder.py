"""The Wan autoencoder at full sequence: encode and decode without the per-chunk feature cache."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn


def build_autoencoder(config: dict) -> AutoencoderKLWan:
    """An untrained `AutoencoderKLWan` of 8x space and 4x time on 2x2 pixel patches."""
    vae = AutoencoderKLWan(
        base_dim=config["encoder_dim"],
        decoder_base_dim=config["decoder_dim"],
        z_dim=16,
        dim_mult=list(config["dim_mult"]),
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _init_conv(module, 0.3 if name.endswith("conv2") else 1.0)
    # start with little posterior noise: at a deviation of one the decoder would see noise only
    with torch.no_grad():
        vae.quant_conv.bias[16:] = -6.0
    return vae


@torch.no_grad()
def _init_conv(conv: nn.Conv2d | nn.Conv3d, gain: float) -> None:
    """Unit gain for pictures: only the newest tap in time starts away from zero."""
    weight = conv.weight
    fan_in = weight.shape[1] * weight.shape[-1] * weight.shape[-2]
    fresh = torch.randn_like(weight) * gain / fan_in**0.5
    if weight.ndim == 5:
        fresh[:, :, :-1] *= 0.1
    weight.copy_(fresh)
    conv.bias.zero_()


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Channel RMS norm and SiLU of [N, C, H, W]; `gamma` is [C]."""
    h = x.float()
    h = h * (h.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)).reciprocal()
    h = h * (h.shape[1] ** 0.5) * gamma.view(1, -1, 1, 1)
    return F.silu(h).to(x.dtype)


class FullSequence:
    """Runs the genuine module's weights over whole clips folded to [B * T, C, H, W]."""

    def __init__(self, vae: AutoencoderKLWan, compiler: Callable | None = None):
        self.vae = vae
        self.norm_silu = compiler(norm_silu) if compiler is not None else norm_silu

    def encode(self, video: Tensor) -> Tensor:
        """Moments [B, T', 32, H / 8, W / 8] of frames [B, T, 3, H, W]; T is 1 or 1 + 4 k."""
        b, t = video.shape[:2]
        x = _fold_patches(video.flatten(0, 1))
        x = x.contiguous(memory_format=torch.channels_last)
        encoder = self.vae.encoder
        x = _conv(encoder.conv_in, x, t)
        for layer in encoder.down_blocks:
            x, t = self._down(layer, x, t)
        x = self._mid(encoder.mid_block, x, t)
        x = self._act(encoder.norm_out, x)
        x = _conv(self.vae.quant_conv, _conv(encoder.conv_out, x, t), t)
        return x.unflatten(0, (b, t))

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W], not clamped, of latents [B, T', 16, H / 8, W / 8]."""
        b, t = latents.shape[:2]
        x = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        decoder = self.vae.decoder
        x = _conv(decoder.conv_in, _conv(self.vae.post_quant_conv, x, t), t)
        x = self._mid(decoder.mid_block, x, t)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x, t)
            if block.upsamplers is not None:
                x, t = _upsample(block.upsamplers[0], x, t)
        x = _conv(decoder.conv_out, self._act(decoder.norm_out, x), t)
        return _unfold_patches(x).unflatten(0, (b, t))

    def _act(self, norm: nn.Module, x: Tensor) -> Tensor:
        return self.norm_silu(x, norm.gamma.flatten())

    def _residual(self, block: nn.Module, x: Tensor, t: int) -> Tensor:
        short = (
            x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x, t)
        )
        x = _conv(block.conv1, self._act(block.norm1, x), t)
        return short + _conv(block.conv2, self._act(block.norm2, x), t)

    def _mid(self, block: nn.Module, x: Tensor, t: int) -> Tensor:
        x = self._residual(block.resnets[0], x, t)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(resnet, _attend(attention, x), t)
        return x

    def _down(self, layer: nn.Module, x: Tensor, t: int) -> tuple[Tensor, int]:
        if not hasattr(layer, "resample"):
            return self._residual(layer, x, t), t
        conv = layer.resample[1]
        x = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        if layer.mode == "downsample3d" and t > 1:
            rows = _rows(x, t)
            taps = torch.cat([rows[:, 0:-2:2], rows[:, 1:-1:2], rows[:, 2::2]], -1)
            rest = _rows(_fold_taps(layer.time_conv, taps), (t - 1) // 2)
            t = (t + 1) // 2
            x = _images(torch.cat([rows[:, :1].to(rest.dtype), rest], 1))
        return x, t


def _fold_patches(x: Tensor) -> Tensor:
    """[N, 3, H, W] to [N, 12, H / 2, W / 2] in the channel order of the module (column, row)."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 5, 3, 2, 4)
    return x.reshape(n, c * 4, h // 2, w // 2)


def _unfold_patches(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 3, 5, 2)
    return x.reshape(n, c // 4, h * 2, w * 2)


def _rows(x: Tensor, t: int) -> Tensor:
    """[B * T, C, H, W] seen as [B, T, H, W, C], contiguous where x is channels-last."""
    return x.permute(0, 2, 3, 1).unflatten(0, (-1, t))


def _images(rows: Tensor) -> Tensor:
    """[B, T, H, W, C] back to channels-last [B * T, C, H, W]."""
    return rows.flatten(0, 1).permute(0, 3, 1, 2)


def _fold_taps(conv: nn.Module, taps: Tensor) -> Tensor:
    """A convolution in time as a 2-D one over the channels of its three taps, [B, T, H, W, 3 C]."""
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    return F.conv2d(_images(taps), weight, conv.bias, padding=weight.shape[-1] // 2)


def _conv(conv: nn.Module, x: Tensor, t: int) -> Tensor:
    """The causal 3-D convolution of x [B * T, C, H, W], as a 2-D one."""
    weight = conv.weight
    if weight.shape[2] == 1 or t == 1:
        last = weight[:, :, -1]
        return F.conv2d(x, last, conv.bias, padding=last.shape[-1] // 2)
    rows = F.pad(_rows(x, t), (0, 0, 0, 0, 0, 0, 2, 0))
    return _fold_taps(conv, torch.cat([rows[:, 0:t], rows[:, 1 : t + 1], rows[:, 2:]], -1))


def _attend(block: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    gamma = block.norm.gamma.view(1, -1, 1, 1)
    y = (F.normalize(x.float(), dim=1) * c**0.5 * gamma).to(x.dtype)
    qkv = F.conv2d(y, block.to_qkv.weight, block.to_qkv.bias)
    query, key, value = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
    y = F.scaled_dot_product_attention(query, key, value)
    y = y.squeeze(1).transpose(1, 2).reshape(n, c, h, w)
    return x + F.conv2d(y, block.proj.weight, block.proj.bias)


def _upsample(layer: nn.Module, x: Tensor, t: int) -> tuple[Tensor, int]:
    if layer.mode == "upsample3d" and t > 1:
        rows = _rows(x, t)
        rest = _rows(_conv(layer.time_conv, _images(rows[:, 1:]), t - 1), t - 1)
        rest = torch.stack(rest.chunk(2, -1), 2).flatten(1, 2)
        x = _images(torch.cat([rows[:, :1].to(rest.dtype), rest], 1))
        t = 2 * t - 1
    rows = x.permute(0, 2, 3, 1)
    n, h, w, c = rows.shape
    rows = rows[:, :, None, :, None].expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c)
    conv = layer.resample[1]
    return F.conv2d(rows.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1), t


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of [N, 3, H, W] in [0, 1] over 7x7 boxes."""

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=2)

    ma, mb = pool(a), pool(b)
    va, vb = pool(a * a) - ma * ma, pool(b * b) - mb * mb
    cov = pool(a * b) - ma * mb
    top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
    return (top / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4))).mean()


def reconstruction_loss(frames: Tensor, target: Tensor) -> Tensor:
    """L1, edge and SSIM terms of [B, T, 3, H, W] in [-1, 1]."""
    a, b = frames.float().flatten(0, 1), target.float().flatten(0, 1)
    loss = (a - b).abs().mean()
    for da, db in zip(_edges(a), _edges(b), strict=True):
        loss = loss + 0.5 * (da - db).abs().mean()
    return loss + 0.15 * (1 - _ssim(a / 2 + 0.5, b / 2 + 0.5))


def autoencoder_loss(model: FullSequence, video: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Training loss and mean squared error (detached) of frames [B, T, 3, H, W]."""
    mean, log_variance = model.encode(video).float().chunk(2, 2)
    log_variance = log_variance.clamp(-20, 4)
    latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    frames = model.decode(latents)
    error = F.mse_loss(frames.detach().float().clamp(-1, 1), video)
    return reconstruction_loss(frames, video) + kl_weight * kl, error
