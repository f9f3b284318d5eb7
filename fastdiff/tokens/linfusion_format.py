"""The published LinFusion format: config.json and weights, read, written and begun from a UNet."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.kernels.linear_attention import linear_attention

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_OLD = "diffusion_pytorch_model.bin"


class Place(NamedTuple):
    """Which self-attention a layer stands for. hidden: width inside of its added projections,
    None for `width`, -1 for none at all."""

    module_name: str
    width: int
    heads: int
    hidden: int | None


class LinearLayer(nn.Module):
    """Self-attention of one UNet layer, linear in its tokens; names and shapes as published.

    q = to_q(x + to_q_(x)), k = to_k(x + to_k_(x)), v = to_v(x); the added projections are
    Linear, LayerNorm, LeakyReLU, Linear. states and result: [B, S, width].
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        width = place.width
        self.heads = place.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_q_, self.to_k_ = (_projection(width, place.hidden) for _ in range(2))

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (self.heads, -1))
            for x in (self.to_q(states + self.to_q_(states)),
                      self.to_k(states + self.to_k_(states)), self.to_v(states)))
        if torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
            return self.to_out[0](linear_attention(query, key, value).flatten(2))
        return self.to_out[0](_linear_attention(query, key, value).flatten(2))


@torch.library.custom_op("fastdiff::linear_attention", mutates_args=())
def _linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return linear_attention(query, key, value)


@_linear_attention.register_fake
def _(query, key, value):
    return query.new_empty(query.shape)


def _projection(width: int, hidden: int | None) -> nn.Module:
    if hidden == -1:
        return nn.Identity()
    inner = hidden or width
    return nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner), nn.LeakyReLU(),
                         nn.Linear(inner, width))


def places(unet: nn.Module, hidden: int | None = None) -> list[Place]:
    """Every self-attention of a UNet, in its order."""
    return [Place(name, module.to_q.out_features, module.heads, hidden)
            for name, module in _attentions(unet)]


def begin(unet: nn.Module, hidden: int | None = None) -> dict[Place, LinearLayer]:
    """Layers to train: the UNet's own projections, and added ones that begin at zero."""
    found = {}
    for place, (_, module) in zip(places(unet, hidden), _attentions(unet), strict=True):
        layer = LinearLayer(place)
        weights = {f"{n}.weight": getattr(module, n).weight for n in ("to_q", "to_k", "to_v")}
        weights |= {f"to_out.0.{n}": p for n, p in module.to_out[0].named_parameters()}
        layer.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, strict=False)
        for added in (layer.to_q_, layer.to_k_):
            if isinstance(added, nn.Sequential):
                for parameter in added[-1].parameters():
                    nn.init.zeros_(parameter)
        found[place] = layer.to(module.to_q.weight.device, module.to_q.weight.dtype)
    return found


def write(folder: Path, layers: dict[Place, LinearLayer]) -> None:
    """Config and weights of these layers, as published weights lie."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"module_name": p.module_name, "dim_n": p.width, "heads": p.heads,
               "projection_mid_dim": p.hidden} for p in layers]
    content = {"_class_name": "LinFusion", "modules_list": listed}
    (folder / CONFIG).write_text(json.dumps(content, indent=2), encoding="utf-8")
    weights = {f"{i}.{name}": value.contiguous() for i, layer in enumerate(layers.values())
               for name, value in layer.state_dict().items()}
    save_file(weights, folder / WEIGHTS)


def read(folder: str | Path) -> dict[Place, LinearLayer]:
    """The layers of published weights. ValueError says what is missing or does not fit."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no LinFusion weights: expected a folder with {CONFIG} and "
            f"{WEIGHTS}, as a download of Yuanshi/LinFusion-1-5, -2-1 or -XL has")
    try:
        listed = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["modules_list"]
        wanted = [Place(str(one["module_name"]), int(one["dim_n"]), int(one["heads"]),
                        one.get("projection_mid_dim")) for one in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / CONFIG} is no LinFusion config: expected \"modules_list\" with "
            f"module_name, dim_n, heads and projection_mid_dim of every layer ({error!r})"
        ) from None
    weights = _weights(folder)
    found = {}
    for i, place in enumerate(wanted):
        own = {name.removeprefix(f"{i}."): value for name, value in weights.items()
               if name.startswith(f"{i}.")}
        layer = LinearLayer(place)
        try:
            layer.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"weights of {place.module_name} in {str(folder)!r} do not fit its "
                             f"config: {error}") from None
        found[place] = layer
    return found


def _weights(folder: Path) -> dict[str, Any]:
    if (folder / WEIGHTS).is_file():
        from safetensors.torch import load_file

        return load_file(folder / WEIGHTS)
    if (folder / WEIGHTS_OLD).is_file():
        return torch.load(folder / WEIGHTS_OLD, map_location="cpu", weights_only=True)
    raise ValueError(f"{str(folder)!r} holds {CONFIG}, but neither {WEIGHTS} nor {WEIGHTS_OLD}")


def _attentions(unet: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in unet.named_modules()
            if name.endswith(".attn1") and hasattr(module, "to_q")]
