"""The one place where FastDiff enters a diffusers model and leaves it."""

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.attention import Layer, Session, attend, attention, dense_attention
from fastdiff.gradients import attention_with_gradients
from fastdiff.layout import TokenLayout
from fastdiff.shadow import DISPATCH, SDPA, restore_class, swap_class

LAYER = "_fastdiff_layer"
HOOK = "_fastdiff_hook"
# on an attention module: what a token method does around its attention call,
# (attend, query, key, value, mask) -> output, all [B, S, H, D]; attend(query, key, value, mask)
# goes on to the policy or to stock attention
STAGE = "_fastdiff_stage"


class _Current(threading.local):
    """What the attention module that is running now told us."""

    layer: Layer | None = None
    stage: Callable[..., Tensor] | None = None
    hidden: int = 0
    context: int = 0


_current = _Current()


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a diffusers attention processor, by the protocol and not by class."""
    for name, module in model.named_modules():
        if hasattr(module, "processor") and hasattr(module, "set_processor"):
            yield name, module


def _take(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None,
    backend: str, obstacle: str | None,
) -> Tensor | None:
    """Attention by FastDiff, all [B, S, H, D]; None leaves this call to the stock function."""
    layer = _current.layer
    if layer is None:
        return None
    denoiser = layer.denoiser
    tokens = query.shape[1]
    if tokens != key.shape[1] or crossing(tokens):
        return None  # cross-attention, to as many tokens in the second case
    whole = denoiser.layout
    if whole is None:
        _refuse(layer, "the latent grid of this model is not known")
        return None
    layout = whole.matching(tokens)
    if layout is None:
        if tokens > whole.grid_tokens:
            _refuse(layer, f"{tokens} tokens do not fit the latent grid {tuple(whole)}")
        return None  # attention over something else: text, time, sound
    if obstacle is not None:
        _refuse(layer, obstacle)
        return None
    ids = denoiser.ids
    sizes = [*layout.grid, layout.before, layout.after]
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        # as autocast does for stock attention
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    run = attend
    if torch.compiler.is_compiling():
        # ops, so that a graph stays whole; each costs the host more than all around it
        wanted = query.requires_grad or key.requires_grad or value.requires_grad
        run = attention_with_gradients if wanted and torch.is_grad_enabled() else attention
    return run(query, key, value, mask, ids, layer.number, sizes, scale, backend)


def _refuse(layer: Layer, reason: str) -> None:
    if not torch.compiler.is_compiling():
        layer.session.fallback(layer, reason)


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """Stand-in for torch's function inside processors. query: [B, H, S, D]."""
    stage = _current.stage
    if stage is not None and query.dim() == 4 and not is_causal and not dropout_p:
        def attend(q, k, v, mask):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return _sdpa_call(q, k, v, mask, 0.0, False, scale, **kwargs).transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return stage(attend, q, k, v, attn_mask, scale).transpose(1, 2)
    return _sdpa_call(query, key, value, attn_mask, dropout_p, is_causal, scale, **kwargs)


def _sdpa_call(query, key, value, attn_mask, dropout_p, is_causal, scale, **kwargs):
    # without an attention method nothing is prepared: small models wait for the host
    if _current.layer is not None and query.dim() == 4:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        obstacle = _obstacle(dropout_p, is_causal, None)
        out = _take(q, k, v, attn_mask, scale, "sdpa", obstacle)
        if out is not None:
            return out.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
        scale=scale, **kwargs,
    )


def _dispatch(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, attention_kwargs=None, *, backend=None, parallel_config=None,
):
    """Stand-in for diffusers' dispatcher inside processors. query: [B, S, H, D]."""
    stage = _current.stage
    rest = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale,
            "enable_gqa": enable_gqa, "attention_kwargs": attention_kwargs, "backend": backend,
            "parallel_config": parallel_config}
    if stage is not None and not is_causal and not dropout_p and parallel_config is None:
        def attend(q, k, v, mask):
            return _dispatch_call(q, k, v, mask, **rest)

        return stage(attend, query, key, value, attn_mask, scale)
    return _dispatch_call(query, key, value, attn_mask, **rest)


def _dispatch_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                   attention_kwargs, backend, parallel_config):
    if _current.layer is not None:
        obstacle = _obstacle(dropout_p, is_causal, parallel_config)
        mask = attn_mask if isinstance(attn_mask, Tensor) else None
        if attn_mask is not mask:
            obstacle = obstacle or f"a mask of type {type(attn_mask).__name__}"
        name = "" if backend is None else getattr(backend, "value", str(backend))
        out = _take(query, key, value, mask, scale, f"dispatch:{name}", obstacle)
        if out is not None:
            return out
    return _stock_dispatch()(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
        scale=scale, enable_gqa=enable_gqa, attention_kwargs=attention_kwargs, backend=backend,
        parallel_config=parallel_config,
    )


STAND_INS = {DISPATCH: _dispatch, SDPA: _sdpa}


def _obstacle(dropout_p: float, is_causal: bool, parallel_config: Any) -> str | None:
    if dropout_p:
        return "attention dropout"
    if is_causal:
        return "causal attention"
    return None if parallel_config is None else "context parallelism"


def _stock_dispatch() -> Callable[..., Tensor]:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn


def _dense_dispatch(query, key, value, mask, scale, name):
    gqa = query.shape[2] != key.shape[2]
    return _stock_dispatch()(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa, backend=name or None
    )


dense_attention["dispatch"] = _dense_dispatch


def _hook(module: nn.Module, function: Callable[..., None]) -> None:
    # native hooks: accelerate's offload puts module.forward back and would lose a wrapper of it
    setattr(function, HOOK, True)
    module.register_forward_pre_hook(function, with_kwargs=True)


def before_forward(model: nn.Module, act: Callable[[], None]) -> None:
    """Call `act` before each forward of `model` that is not compiled, until it is disarmed."""

    _hook(model, lambda *_: None if torch.compiler.is_compiling() else act())


def disarm(model: nn.Module) -> None:
    """Make this model stock again. Walks it, so that a deep copy of an armed model is found too."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if hasattr(hook, HOOK)]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
        module.__dict__.pop(LAYER, None)
        module.__dict__.pop(STAGE, None)
    for _, module in attention_modules(model):
        restore_class(module.processor)
    # fuse_qkv_projections keeps the processors from before, and unfuse puts them back
    for processor in (getattr(model, "original_attn_processors", None) or {}).values():
        restore_class(processor)
    _current.layer = _current.stage = None


def entering(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Say that this attention module runs now: its layer, its stage, its sequence lengths."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    if isinstance(other, tuple):
        other = other[0]  # IP-Adapter: text, then pictures
    _current.layer = getattr(module, LAYER, None)
    _current.stage = getattr(module, STAGE, None)
    _current.hidden = 0 if hidden is None else hidden.shape[1]
    _current.context = 0 if other is None else other.shape[1]
    if not torch.compiler.is_compiling():
        # fuse_qkv_projections, IP-Adapters and users replace processors
        swap_class(module.processor, STAND_INS)


def crossing(tokens: int) -> bool:
    """Whether the attention that runs now, with so many keys, looks at another sequence."""
    return bool(_current.context) and tokens != _current.hidden + _current.context


class Denoiser:
    """A transformer or UNet that FastDiff drives: its layers, and the layout of the running call.

    read: (module, arguments by name) -> TokenLayout, or (TokenLayout, ids) where only position ids
        know the grid. site: class name of the submodule whose input shows the grid, None for the
        model itself. skip: parts of module names whose attention is not over the latent grid.
        prefix: of layer names, where there are several models.
    """

    def __init__(
        self, model: nn.Module, read: Callable[..., Any], site: str | None, skip: tuple[str, ...],
        session: Session, prefix: str = "",
    ) -> None:
        self.model = ref(model)
        self._prefix = prefix
        self.session = session
        self.layout: TokenLayout | None = None
        self.ids: Tensor | None = None
        self.unsupported: list[str] = []
        self.layers: list[Layer] = []
        self._skip = skip
        self._read = read
        self._grid: tuple[Tensor, tuple[int, int, int]] | None = None
        sites = [model] if site is None else [
            m for m in model.modules() if type(m).__name__ == site
        ]
        for module in sites:
            self._watch(module)
        self.arm()

    def arm(self) -> None:
        """Take over every attention module, also those that appeared or changed since."""
        model = self.model()
        if model is None:
            return
        self.unsupported = []
        for name, module in attention_modules(model):
            if any(part in name for part in self._skip):
                continue
            if not swap_class(module.processor, STAND_INS):
                self.unsupported.append(f"{self._prefix}{name} ({type(module.processor).__name__})")
                continue
            if getattr(module, LAYER, None) is None:
                self._arm_module(name, module)

    def grid_from_ids(self, ids: Tensor) -> tuple[int, int, int]:
        """The grid that position ids [S, 3 or more] span; read once per ids tensor."""
        if self._grid is None or self._grid[0] is not ids:
            sizes = [int(n) for n in (ids[:, -2:].amax(0) - ids[:, -2:].amin(0) + 1).tolist()]
            count, plane = ids.shape[0], sizes[0] * sizes[1]
            grid = (count // plane, sizes[0], sizes[1]) if count % plane == 0 else (1, 1, count)
            self._grid = (ids, grid)
        return self._grid[1]

    def _watch(self, module: nn.Module) -> None:
        names = [*inspect.signature(type(module).forward).parameters][1:]
        read = self._read

        def before_forward(module, args, kwargs):
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            found = read(module, arguments)
            if isinstance(found, TokenLayout) or found is None:
                self.layout, self.ids = found, None
            else:
                self.layout, self.ids = found

        _hook(module, before_forward)

    def _arm_module(self, name: str, module: nn.Module) -> None:
        layer = Layer(self._prefix + name, self, self.session)
        self.layers.append(layer)
        object.__setattr__(module, LAYER, layer)

        _hook(module, entering)
