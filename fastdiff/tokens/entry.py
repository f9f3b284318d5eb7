"""Entry: how a token method enters a model, hook by hook, and leaves it again."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.clock import StepClock
from fastdiff.layout import TokenLayout
from fastdiff.method import Host, Part, check, held
from fastdiff.seam import LAYER, STAGE, STAND_INS, attention_modules, entering
from fastdiff.shadow import ORIGINAL, restore_class, swap_class

# (attend, query, key, value, mask, scale) -> output; query and the like are [B, S, H, D]
Stage = Callable[..., Tensor]


CLAIMS = "_fastdiff_claims"


class Entry:
    """Everything that one method put into the models, and the way to take it out."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def leave(self) -> None:
        """Take everything out, last one first. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def on_leave(self, undo: Callable[[], Any]) -> None:
        self._undo.append(undo)

    def claim(self, model: nn.Module, name: str, clashes: tuple[str, ...]) -> None:
        """Say that this method works on the model; ValueError where another one is in the way.

        clashes: methods that cannot work beside this one, in whichever order they came.
        """
        claims = model.__dict__.get(CLAIMS, {})
        for other, its_clashes in claims.items():
            if other in clashes or name in its_clashes:
                raise ValueError(f"{name} and {other} change the same tokens of a model: use one")
        object.__setattr__(model, CLAIMS, {**claims, name: clashes})
        self.on_leave(lambda: _withdraw(model, name))

    # native hooks: accelerate's offload puts module.forward back and would lose a wrapper of it

    def before(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """function(module, args, kwargs) before the forward; (args, kwargs) back replaces them."""
        hook = module.register_forward_pre_hook(function, with_kwargs=True)
        self.on_leave(hook.remove)

    def after(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """function(module, args, output) after the forward; a value back replaces the output."""
        self.on_leave(module.register_forward_hook(function).remove)

    def stages(self, model: nn.Module, clock: StepClock, chosen: dict[str, Stage],
               outermost: bool = False) -> None:
        """Put a stage around the attention call of some modules, by name.

        Where another method has put one already, the outermost of the two is called first and the
        other is its `attend`.
        """
        modules = dict(attention_modules(model))
        for module in modules.values():
            self._drive(module)
        for name, stage in chosen.items():
            module = modules[name]
            other = module.__dict__.get(STAGE)
            if other is not None:
                stage = _around(stage, other) if outermost else _around(other, stage)
            object.__setattr__(module, STAGE, stage)
            self.on_leave(lambda module=module, other=other: _put_back(module, other))

        def arm() -> None:
            for module in modules.values():
                swap_class(module.processor, STAND_INS)

        clock.on_begin(arm)
        self.on_leave(lambda: _restore_fused(model))

    def _drive(self, module: Any) -> None:
        """Let the attention call of this module come to the seam; nothing to do if it does."""
        if hasattr(module, LAYER) or hasattr(type(module.processor), ORIGINAL):
            return
        if swap_class(module.processor, STAND_INS):
            # the processor that is there on leaving, which need not be this one
            self.on_leave(lambda: restore_class(module.processor))
            self.before(module, entering)


def _around(outer: Stage, inner: Stage) -> Stage:
    def both(attend, query, key, value, mask, scale):
        def go_on(q, k, v, m):
            return inner(attend, q, k, v, m, scale)

        return outer(go_on, query, key, value, mask, scale)

    return both


def _put_back(module: nn.Module, stage: Stage | None) -> None:
    if stage is None:
        module.__dict__.pop(STAGE, None)
    else:
        object.__setattr__(module, STAGE, stage)


def _withdraw(model: nn.Module, name: str) -> None:
    left = {other: clash for other, clash in model.__dict__[CLAIMS].items() if other != name}
    if left:
        object.__setattr__(model, CLAIMS, left)
    else:
        del model.__dict__[CLAIMS]


def _restore_fused(model: nn.Module) -> None:
    # fuse_qkv_projections keeps the processors from before, and unfuse puts them back
    for processor in (getattr(model, "original_attn_processors", None) or {}).values():
        restore_class(processor)


class Site:
    """A module whose input shows the grid, and the grid of the running call.

    For a UNet every Transformer2DModel is one, for other denoisers the model itself.
    """

    def __init__(self, name: str, module: nn.Module, read: Callable[..., Any]) -> None:
        self.name = name
        self.module = module
        self.layout: TokenLayout | None = None
        self.batch = 0
        self._read = read
        self._names = [*inspect.signature(type(module).forward).parameters][1:]
        self._ids: tuple[Tensor, TokenLayout] | None = None

    def __deepcopy__(self, memo: dict) -> "Site":
        return self

    def look(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Read the grid off the arguments of this call; the arguments by name."""
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        found = self._read(self.module, arguments)
        if found is not None and not isinstance(found, TokenLayout):
            found = self._spanned(*found)
        if found is not None:
            frames, height, width = found.grid
            grid = (fixed(frames), fixed(height), fixed(width))
            found = TokenLayout(grid, fixed(found.before), fixed(found.after))
        self.layout = found
        hidden = arguments.get("hidden_states")
        self.batch = 0 if hidden is None else fixed(hidden.shape[0])
        return arguments

    def hook(self) -> Callable[..., None]:
        """A forward pre-hook that looks."""
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.look(args, kwargs)

        return look

    def _spanned(self, layout: TokenLayout, ids: Tensor) -> TokenLayout:
        """The layout whose grid position ids [S, 3 or more] span; read once per ids tensor."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self.name}: only position ids know the grid of this model, and reading them "
                "breaks a compiled graph. Run this token method without torch.compile here.")
        if self._ids is None or self._ids[0] is not ids:
            span = ids[:, -2:].amax(0) - ids[:, -2:].amin(0) + 1
            height, width = (int(n) for n in span.tolist())
            frames, rest = divmod(ids.shape[0], height * width)
            grid = (1, 1, ids.shape[0]) if rest else (frames, height, width)
            self._ids = ids, TokenLayout(grid, layout.before, layout.after)
        return self._ids[1]


def fixed(size: int) -> int:
    """A size as a plain number; a graph that is traced with dynamic sizes becomes this size's."""
    # a range is the one place where Dynamo settles a symbolic size without breaking the graph
    return len(range(size))


def sites(name: str, part: Part) -> dict[str, Site]:
    """The sites of a denoiser by module name; "" is the denoiser itself."""
    family = part.family
    if family.site is None:
        return {"": Site(name, part.model, family.read)}
    return {path: Site(f"{name}.{path}", module, family.read)
            for path, module in part.model.named_modules()
            if type(module).__name__ == family.site}


class Phase:
    """Whether the running step is one of the first; kept outside of traced code by the clock."""

    def __init__(self, clock: StepClock, early: int | float) -> None:
        self.early = False
        self._clock = clock
        self._steps = early
        clock.on_begin(self._look)
        clock.on_advance(self._look)
        self._look()

    def __deepcopy__(self, memo: dict) -> "Phase":
        return self

    def _look(self) -> None:
        clock = self._clock
        first = self._steps
        if isinstance(first, float):
            first = round(first * clock.steps)
        self.early = clock.step is not None and clock.step < first


class Branches:
    """How many guidance branches one forward holds; asked at the start of each run."""

    def __init__(self, host: Host) -> None:
        self.count = 1
        self._pipe = (lambda: None) if host.pipe is None else held(host.pipe)
        host.clock.on_begin(self._look)
        self._look()

    def __deepcopy__(self, memo: dict) -> "Branches":
        return self

    def _look(self) -> None:
        guided = ("do_classifier_free_guidance", "do_perturbed_attention_guidance")
        self.count = 1 + sum(bool(getattr(self._pipe(), name, False)) for name in guided)


def check_steps(knob: str, value: int | float) -> None:
    fraction_ok = not isinstance(value, float) or value <= 1
    check(value >= 0 and fraction_ok, knob, value,
          "a number of steps (int), or a fraction from 0.0 to 1.0")


def wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
