"""The dual path of FreeSwim: a window branch that is the result, a dense branch that guides it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.clock import StepClock
from fastdiff.layout import Grid, TokenLayout
from fastdiff.method import Part
from fastdiff.pipelines.upscale.cache import GuideCache
from fastdiff.pipelines.upscale.cross import Cross, cross_modules
from fastdiff.pipelines.upscale.driven import driven
from fastdiff.pipelines.upscale.joint import Rows, windowed_rows
from fastdiff.pipelines.upscale.turn import Turn, arguments_by_name, batch_of
from fastdiff.policies.inward_window import (
    Sides,
    WindowPlan,
    exact_window,
    tiled_window,
    trained_window,
    window_plan,
)
from fastdiff.seam import attention_modules, crossing

MODES = ("cache", "nocache", "window", "dense")
SLIDES = ("auto", "tile", "token")


class Ways(NamedTuple):
    """How the second stage attends: knobs of the method."""

    mode: str = "cache"
    interval: int = 2
    slide: str = "auto"
    scale_mult: float = 1.0


class Sizes(NamedTuple):
    """Sides of the picture in pixels, as trained and as wanted, and pixels a token is wide."""

    native: Sides
    target: Sides
    token: int

    def native_grid(self, grid: Grid) -> Sides:
        """The trained (height, width) in tokens, where the target has `grid`."""
        height, width = (max(1, n * had // has) for n, had, has in
                         zip(grid[1:], self.native, self.target, strict=True))
        return height, width

    def known(self, layout: TokenLayout) -> TokenLayout:
        """The layout of a packed sequence whose own arguments do not show its sides."""
        side = (self.target[0] // self.token, self.target[1] // self.token)
        frames, rest = divmod(layout.grid_tokens, side[0] * side[1])
        if rest:
            raise ValueError(f"{layout.grid_tokens} latent tokens are no frames of {side[0]} x "
                             f"{side[1]}: this pipeline adds tokens that windows do not know")
        return layout._replace(grid=(frames, *side))


class DualPath:
    """What every forward of the second stage does; entered for the time of one call.

    cross: text comes by cross-attention; else it shares the grid's attention. batched: whether a
    forward may hold both guidance branches, the unconditional one first.
    count: told ("guide passes" and the like) at each forward.
    """

    def __init__(
        self, ways: Ways, sizes: Sizes, clock: StepClock, cache: GuideCache, cross: bool,
        batched: Callable[[], bool], count: Callable[[str], None],
    ) -> None:
        self.ways, self.sizes, self.clock, self.cache = ways, sizes, clock, cache
        self.turn: Turn | None = None
        self.layout: TokenLayout | None = None
        self.plans: dict[Grid, WindowPlan] = {}
        self.on_plan: Callable[[WindowPlan], None] = lambda plan: None
        self.on_gather: Callable[[str], None] = lambda reason: None
        self._cross, self._batched, self._count = cross, batched, count
        self._layers = 0
        self._keys: dict[int, set[int]] = {}
        self._running: int | None = None
        self._recording = False

    @contextmanager
    def entered(self, models: dict[str, Part]) -> Iterator[None]:
        if self.ways.mode == "dense":
            yield
            return
        with ExitStack() as stack:
            try:
                for part in models.values():
                    self._enter(part, stack)
                yield
            finally:
                self.turn = self.layout = None
                self.cache.clear()

    def _enter(self, part: Part, stack: ExitStack) -> None:
        model, family = part
        crosses = cross_modules(model, "attn2") if self._cross else []
        stages = {}
        modules = [module for name, module in attention_modules(model)
                   if not any(word in name for word in family.skip)]
        for module in crosses:
            cross = Cross(module, lambda: self.turn, self.cache, len(crosses))
            stack.enter_context(cross.entered())
            stages[module] = cross.stage if cross.pictures else None
        self._layers = len(modules)
        self._keys[id(model)] = {id(module) for module in (crosses or modules)}
        for module in modules:
            stage = stages[module] if module in stages else self._stage_of(module)
            if stage is not None:
                stack.enter_context(driven(module, stage))
        self._hook(model, family, stack)

    def _hook(self, model: nn.Module, family: Any, stack: ExitStack) -> None:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            arguments = arguments_by_name(module, args, kwargs)
            if self._recording:
                self.turn = Turn("record", batch_of(arguments))
            else:
                self.turn = self._begun(module, arguments)
            if self.turn.kind == "guide":
                arguments = self.turn.extended(arguments)
            if family.site is None:
                self._look(module, family, arguments)
            return (), arguments

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            rows, self.turn = (self.turn.rows if self.turn else 0), None
            if isinstance(out, tuple):
                return (out[0][:rows], *out[1:])
            out.sample = out.sample[:rows]
            return out

        def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._look(module, family, arguments_by_name(module, args, kwargs))

        if family.site is not None:
            for module in model.modules():
                if type(module).__name__ == family.site:
                    hook = module.register_forward_pre_hook(look, with_kwargs=True)
                    stack.callback(hook.remove)
        hook = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        stack.callback(model.register_forward_hook(after).remove)

    def _begun(self, module: nn.Module, arguments: dict[str, Any]) -> Turn:
        """The turn of a forward; a guide that can be kept has gone through the model by then.

        Alone it needs the memory of one branch, and both together take as long as one after the
        other.
        """
        turn = self.decide(module, batch_of(arguments))
        if turn.kind != "guide" or self.ways.mode != "cache" or not self.cache.keeps:
            return turn
        self._recording = True
        try:
            module(**turn.guides(arguments))
        finally:
            self._recording = False
        return turn._replace(kind="reuse") if self._kept(module) else turn

    def _kept(self, model: nn.Module) -> bool:
        """Whether every layer's guide is there."""
        return all(self.cache.holds(key) for key in self._keys[id(model)])

    def _look(self, module: nn.Module, family: Any, arguments: dict[str, Any]) -> None:
        found = family.read(module, arguments)
        if isinstance(found, TokenLayout):
            self.layout = found
        else:
            self.layout = None if found is None else self.sizes.known(found[0])
        if self.layout is None:
            raise ValueError(f"the grid of {type(module).__name__} is not to be read off its "
                             "arguments, so it cannot be cut into windows")

    def decide(self, model: nn.Module, rows: int) -> Turn:
        """The turn of a forward of `rows` rows in the present step and guidance branch."""
        mode, key = self.ways.mode, id(model)
        if mode == "cache" and self._running not in (None, key):
            # another expert has begun: what the first one's layers said is of no use to it
            self.cache.drop(self._keys[self._running])
        self._running = key
        uncond = self.clock.branch == "uncond"
        first = 0
        if mode == "window" or (mode == "cache" and uncond):
            kind = "window"
        elif mode == "nocache":
            kind = "guide"
        else:
            first = rows // 2 if self._batched() and self.clock.branch != "cond" else 0
            step = self.clock.step or 0
            fresh = step % self.ways.interval == 0
            kind = "guide" if fresh or not self._kept(model) else "reuse"
        self._count(f"{kind} passes")
        return Turn(kind, rows, first)

    def _plan(self, grid: Grid, device: torch.device, joint: bool) -> WindowPlan:
        if grid not in self.plans:
            # joint attention needs the denominator, which blocks alone give
            slide = "tile" if joint and self.ways.slide == "auto" else self.ways.slide
            block = 128 if device.type == "cuda" else 64
            window = trained_window(self.sizes.native_grid(grid))
            plan = window_plan(grid, window, slide, block, device)
            self.plans[grid] = plan
            self.on_plan(plan)
        return self.plans[grid]

    def _stage_of(self, module: nn.Module) -> Callable[..., Tensor]:
        def stage(attend, query, key, value, mask, scale):
            turn, whole = self.turn, self.layout
            tokens = query.shape[1]
            if turn is None or whole is None or tokens != key.shape[1] or crossing(tokens):
                return attend(query, key, value, mask)
            layout = whole.matching(tokens)
            if layout is None:
                return attend(query, key, value, mask)
            query = query * self.ways.scale_mult
            joint = layout.tokens > layout.grid_tokens
            plan = self._plan(layout.grid, query.device, joint)
            if not joint:
                return self._grid(plan, attend, query, key, value, mask, scale)
            call = Rows(attend, query, key, value, mask, scale, layout)
            return self._joint(plan, call, id(module))

        return stage

    def _grid(self, plan: WindowPlan, attend: Any, query: Tensor, key: Tensor, value: Tensor,
              mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention over the grid alone."""
        if mask is not None:
            raise ValueError("windows know no attention mask over the latent grid")
        turn = self.turn
        assert turn is not None
        if plan.full or turn.kind == "record":
            return attend(query, key, value, None)
        rows = slice(0, turn.rows)
        if plan.single:
            out = exact_window(query[rows], key[rows], value[rows], plan, scale, self.on_gather)
        else:
            out, _ = tiled_window(query[rows], key[rows], value[rows], plan, scale)
        if turn.kind != "guide":
            return out
        dense = attend(query[turn.rows :], key[turn.rows :], value[turn.rows :], None)
        return torch.cat([out, dense])

    def _joint(self, plan: WindowPlan, call: Rows, key: int) -> Tensor:
        """Attention over text and grid; see joint.py for what is overridden."""
        turn = self.turn
        assert turn is not None

        def window(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
            return tiled_window(q, k, v, plan, scale)

        if turn.kind == "window":
            rows = slice(0, turn.rows)
            return call.windowed(rows, window, call.text(rows))
        if turn.kind == "reuse":
            out, lse = self.cache.get(key, call.query.device)
            return windowed_rows(turn, call, window, (out, lse))
        guide = slice(turn.rows if turn.kind == "guide" else 0, turn.batch)
        said = call.text(guide)
        if self.ways.mode == "cache":
            self.cache.settle(said, self._layers)
            self.cache.put(key, said)
        if turn.kind == "record":
            return call.dense(guide)
        return torch.cat([windowed_rows(turn, call, window, said), call.dense(guide)])
