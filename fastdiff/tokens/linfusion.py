"""LinFusion: trained linear attention in place of a UNet's self-attention."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import ref

from torch import Tensor, nn

from fastdiff.method import Host, Method
from fastdiff.seam import LAYER
from fastdiff.tokens.entry import Entry
from fastdiff.tokens.linfusion_format import LinearLayer, Place, read

logger = logging.getLogger("fastdiff")
LINEAR = "_fastdiff_linear"


@dataclass(frozen=True, kw_only=True)
class LinFusion(Method):
    """Loads published LinFusion weights into a UNet's self-attention, and takes them out again.

    weights: folder with config.json and diffusion_pytorch_model.safetensors, as a download of
        Yuanshi/LinFusion-1-5 (Stable Diffusion 1.5), -2-1 or -XL has; nothing is downloaded here.

    The weights bring their own query, key, value and output projections, so a LoRA that changes
    those of self-attention has no effect there; the report names such adapters. They were trained
    with these layers: softmax attention cannot be made linear without training, so there is no
    form of this method without weights. Cost: linear in the tokens, and two more small projections
    a layer; at 512 x 512 slower than softmax attention, see docs/tokens.md. The weights stay where
    the layer first ran, also under CPU offload. Source: LinFusion (arXiv 2409.02097).
    """

    name: ClassVar[str] = "linfusion"
    summary: ClassVar[str] = "UNets: trained linear self-attention from published weights"
    kind: ClassVar[str] = "tokens"

    weights: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, Path):
            object.__setattr__(self, "weights", str(self.weights))

    def attach(self, host: Host) -> Callable[[], None]:
        if self.weights is None:
            raise ValueError("linfusion needs weights: pass weights=\"folder\", a download of "
                             "Yuanshi/LinFusion-1-5, -2-1 or -XL")
        layers = read(self.weights)
        entry = Entry()
        try:
            for name, part in host.models.items():
                entry.claim(part.model, self.name,
                            ("at-edm", "zero-tprune", "kv-downsample", "query-skip"))
                chosen = {m: _fit(name, part.model, place, layer)
                          for place, layer in layers.items()
                          for m in [_module(name, part.model, place)]}
                self._enter(host, entry, part.model, chosen)
        except BaseException:
            entry.leave()
            raise
        return entry.leave

    def _enter(
        self, host: Host, entry: Entry, model: nn.Module, layers: dict[str, LinearLayer]
    ) -> None:
        modules: dict[str, Any] = dict(model.named_modules())
        for name, layer in layers.items():
            module = modules[name]
            object.__setattr__(module, LINEAR, layer)
            entry.on_leave(lambda module=module: module.__dict__.pop(LINEAR))
            _Swapped(module, entry, host)
        weak = ref(model)
        told: list[list[str]] = [[]]

        def look() -> None:
            host.report.tell(self.name, "layers", len(layers))
            found = without_effect(weak(), set(layers))
            if found:
                host.report.tell(self.name, "LoRA without effect on self-attention",
                                 ", ".join(found))
                if told[0] != found:
                    logger.warning("linfusion: LoRA without effect on self-attention: %s",
                                   ", ".join(found))
                told[0] = found

        host.clock.on_begin(look)


class _Swapped:
    """Keeps our processor on a module whose processors others may replace."""

    def __init__(self, module: Any, entry: Entry, host: Host) -> None:
        self._module = ref(module)
        self._stock: Any = None
        self._put()
        host.clock.on_begin(self._put)
        entry.on_leave(self._leave)

    def _put(self) -> None:
        module = self._module()
        if module is not None and LINEAR in module.__dict__ and not isinstance(
                module.processor, LinFusionProcessor):
            self._stock = module.processor
            module.processor = LinFusionProcessor()

    def _leave(self) -> None:
        module = self._module()
        if module is not None and isinstance(module.processor, LinFusionProcessor):
            module.processor = self._stock


class LinFusionProcessor:
    """diffusers' processor protocol; the layer hangs on the attention module, so that an adapter
    that makes all processors anew (`type(processor)()`) changes nothing."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("linfusion replaces plain self-attention; this call has a mask or "
                             "another sequence. Take it out with disable_fastdiff().")
        layer = attn.__dict__[LINEAR]
        weight = layer.to_v.weight
        if weight.device != hidden_states.device or weight.dtype != hidden_states.dtype:
            layer.to(hidden_states.device, hidden_states.dtype)
        return layer(hidden_states)


def without_effect(model: Any, swapped: set[str]) -> list[str]:
    """Active LoRA adapters with weights in swapped self-attention: "name (wholly)" or "(partly)".
    """
    inside: dict[str, int] = {}
    everywhere: dict[str, int] = {}
    for name, module in model.named_modules() if model is not None else ():
        lora = getattr(module, "lora_A", None)
        if lora is None:
            continue
        here = any(name.startswith(f"{layer}.") for layer in swapped)
        for adapter in getattr(module, "active_adapters", None) or []:
            if adapter in lora:
                everywhere[adapter] = everywhere.get(adapter, 0) + 1
                inside[adapter] = inside.get(adapter, 0) + here
    return [f"{adapter} ({'wholly' if count == everywhere[adapter] else 'partly'})"
            for adapter, count in sorted(inside.items()) if count]


def _module(name: str, model: nn.Module, place: Place) -> str:
    """The name of the module that a layer stands for; ValueError where it does not fit."""
    module: Any = dict(model.named_modules()).get(place.module_name)
    weight = getattr(getattr(module, "to_q", None), "weight", None)
    if module is None or weight is None:
        raise ValueError(f"these LinFusion weights are for another model: {name} "
                         f"({type(model).__name__}) has no self-attention {place.module_name!r}")
    if hasattr(module, LAYER):
        raise ValueError("linfusion replaces self-attention, so an attention method has nothing "
                         "left to choose from: use one of the two")
    if (module.query_dim, module.heads) != (place.width, place.heads):
        raise ValueError(
            f"these LinFusion weights are for another model: {place.module_name} has width "
            f"{module.query_dim} and {module.heads} heads, the weights {place.width} and "
            f"{place.heads}")
    return place.module_name


def _fit(name: str, model: nn.Module, place: Place, layer: LinearLayer) -> LinearLayer:
    parameter = next(model.get_submodule(place.module_name).parameters())
    dtype = parameter.dtype if parameter.dtype.is_floating_point else layer.to_v.weight.dtype
    device = parameter.device if parameter.device.type != "meta" else "cpu"
    return layer.to(device, dtype).requires_grad_(False)
