"""The handle behind `pipe.fastdiff`: what is on, where, and how all of it is taken out again."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import nn

from fastdiff import scheduler as scheduler_clock
from fastdiff.attention import Session
from fastdiff.clock import StepClock
from fastdiff.config import to_plan
from fastdiff.method import Method, Part
from fastdiff.pipelines.staged.call import unwrap_call
from fastdiff.policies import Policy
from fastdiff.report import Report
from fastdiff.seam import LAYER, STAGE, Denoiser, attention_modules, disarm
from fastdiff.shadow import supported

HANDLE = "_fastdiff_handle"


class Handle:
    """What is on, and what happened in the last run. Print it."""

    def __init__(
        self, methods: tuple[Method, ...], session: Session, models: dict[str, Part]
    ) -> None:
        self.methods = methods
        self._session = session
        self._denoisers: list[Denoiser] = []
        self._names = {name: part.family.name for name, part in models.items()}
        self._detach: list[Callable[[], None]] = []
        # weak: the last layer that ran is remembered, and would keep every weight alive
        self._pipe: Callable[[], Any] = lambda: None
        self._scheduler: Any = None
        self._models = {name: ref(part.model) for name, part in models.items()}

    def __deepcopy__(self, memo: dict) -> "Handle":
        # a copied model must not copy the whole pipeline with it
        return self

    @property
    def enabled(self) -> bool:
        return bool(self._models)

    @property
    def policy(self) -> Policy | None:
        """The attention method, None where attention stays stock."""
        return self._session.chosen

    @property
    def report(self) -> Report:
        """The last run: per layer density, operations, seconds, dense calls and why."""
        return self._session.report

    @property
    def clock(self) -> StepClock:
        return self._session.clock

    @property
    def strict(self) -> bool:
        return self._session.strict

    def plan(self) -> dict[str, Any]:
        """Settings as plain data; `enable_fastdiff(plan=...)` takes it back."""
        return to_plan(self.methods)

    def __repr__(self) -> str:
        state = "is on" if self.enabled else "was on, and is off"
        lines = [f"FastDiff {state}: {_told(method)}" for method in self.methods]
        parts = ", ".join(f"{name} ({family})" for name, family in self._names.items())
        armed = sum(len(d.layers) for d in self._denoisers)
        if parts:
            lines += [f"on {parts}" + (f": {armed} attention modules" if armed else "")]
        lines += [f"runs stock: {name}, {_REPLACED}" for name in self._replaced()]
        for denoiser in self._denoisers:
            lines += [f"left stock, no attention call to take over: {name}"
                      for name in denoiser.unsupported]
        told = self.report
        counted = told.rows() or told.methods or told.stock
        lines += [str(told) if counted or not self.clock.run else
                  "it ran, and nothing was counted: calls of compiled code are not"]
        return "\n".join(lines)

    def _arm(self) -> None:
        for denoiser in self._denoisers:
            denoiser.arm()

    def _drives(self, model: Any) -> bool:
        """Whether this handle was made for `model` itself, not for one it was copied from."""
        return any(held() is model for held in self._models.values())

    def _release(self, model: nn.Module) -> None:
        """Make one model stock. With its last model, or beside other methods, all of it ends."""
        release(model)
        for name in [name for name, held in self._models.items() if held() is model]:
            del self._models[name], self._names[name]
        self._denoisers = [d for d in self._denoisers if d.model() is not model]
        if not self._models or any(method.kind != "attention" for method in self.methods):
            self._close()

    def _close(self) -> None:
        """Take out all that this handle put in, last one first, also from what was replaced."""
        while self._detach:
            self._detach.pop()()
        for model in [held() for held in self._models.values()]:
            if model is not None and model.__dict__.get(HANDLE) is self:
                release(model)
        self._models.clear()
        if scheduler_clock.clock_of(self._scheduler) is self.clock:
            scheduler_clock.disarm_scheduler(self._scheduler)
        pipe = self._pipe()
        if pipe is not None:
            forget(pipe)
        self._pipe, self._scheduler = lambda: None, None
        # a copied model goes on without a step
        self.clock.step = None

    def _watch_scheduler(self) -> None:
        scheduler = getattr(self._pipe(), "scheduler", None)
        if scheduler is None or scheduler_clock.clock_of(scheduler) is self.clock:
            return
        # the user replaced pipe.scheduler after enabling, or another pipeline shares it and
        # counts; its run began unseen
        if scheduler_clock.clock_of(self._scheduler) is self.clock:
            scheduler_clock.disarm_scheduler(self._scheduler)
        scheduler_clock.arm_scheduler(scheduler, self.clock)
        self._scheduler = scheduler
        if getattr(scheduler, "timesteps", None) is not None:
            self.clock.begin(len(scheduler.timesteps))

    def _replaced(self) -> list[str]:
        """Parts of the pipeline that hold another model than the one that is driven."""
        pipe = self._pipe()
        return [name for name, held in self._models.items()
                if isinstance(part := getattr(pipe, name, None), nn.Module)
                # wrapped ones (torch.compile, PEFT) still hold it
                and all(module is not held() for module in part.modules())]

    def _tell_replaced(self) -> None:
        """Say what the user has put in since, and FastDiff does not drive."""
        for name in self._replaced():
            self._session.stays_stock(name, _REPLACED)
        models = [model for held in self._models.values() if (model := held()) is not None]
        odd = Counter(
            type(module.processor).__name__ for model in models
            for _, module in attention_modules(model)
            if {LAYER, STAGE} & vars(module).keys() and not supported(module.processor))
        for processor, count in odd.items():
            self._session.stays_stock(f"{count} attention modules", (
                f"{processor}, set after FastDiff was enabled, calls no attention that can be "
                "taken over (attention slicing does that: disable_attention_slicing)"))


_REPLACED = "put in after FastDiff was enabled: call enable_fastdiff again"


def release(model: nn.Module) -> None:
    """Make this model stock again, one that was driven or a copy of it."""
    model.__dict__.pop(HANDLE, None)
    model.__dict__.pop("cache_context", None)
    disarm(model)


def forget(target: Any) -> None:
    """Take off a pipeline what hangs on the pipeline itself, one that was driven or a copy."""
    held = getattr(target, "__dict__", {})
    if held.pop(HANDLE, None) is not None:
        held.pop("__deepcopy__", None)
    unwrap_call(target)


def _told(method: Method) -> str:
    # a plan's table is told in words, once a run begins
    shown = {k: v for k, v in method.to_dict().items()
             if k != "method" and v is not None and not isinstance(v, dict)}
    return f"{method.name} ({', '.join(f'{k}={v}' for k, v in shown.items())})"


class Off:
    """`pipe.fastdiff` of a pipeline that runs stock."""

    enabled = False

    def __repr__(self) -> str:
        return "FastDiff is off: this pipeline runs stock"


def handle_of(target: Any) -> Handle | Off:
    """The handle of a pipeline or model, its own or that of a model it shares; else Off."""
    own = getattr(target, "__dict__", {}).get(HANDLE)
    if own is not None:
        return own
    for part in (getattr(target, "components", None) or {}).values():
        held = getattr(part, "__dict__", {}).get(HANDLE)
        # a sampling method changes the calls of its own pipeline, and no model
        if held is not None and any(method.kind != "sampling" for method in held.methods):
            return held
    return Off()
