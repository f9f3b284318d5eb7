"""enable and disable, the two pipeline methods, and the handle behind `pipe.fastdiff`."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import nn

from fastdiff import scheduler as scheduler_clock
from fastdiff.attention import DenseFallbackError, Session
from fastdiff.clock import StepClock
from fastdiff.config import from_plan, make_methods, to_plan
from fastdiff.method import Host, Method, Part
from fastdiff.pipelines.families import families, family_of
from fastdiff.pipelines.families.generic import GENERIC
from fastdiff.pipelines.staged.call import unwrap_call
from fastdiff.policies import Policy
from fastdiff.report import Report
from fastdiff.seam import Denoiser, attention_modules, disarm
from fastdiff.shadow import supported

HANDLE = "_fastdiff_handle"
# parts of a pipeline that hold attention and are not the denoiser
_NOT_DENOISERS = ("vae", "vqvae", "controlnet", "text_encoder", "image_encoder", "safety_checker")
_NOT_DENOISER_HOMES = ("diffusers.models.autoencoders.", "diffusers.models.controlnets.")


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
        self._models = [ref(part.model) for part in models.values()]

    def __deepcopy__(self, memo: dict) -> "Handle":
        # a copied model must not copy the whole pipeline with it
        return self

    @property
    def enabled(self) -> bool:
        return True

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

    def plan(self) -> dict[str, Any]:
        """Settings as plain data; `enable_fastdiff(plan=...)` takes it back."""
        return to_plan(self.methods)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} ({family})" for name, family in self._names.items())
        armed = sum(len(d.layers) for d in self._denoisers)
        lines = [f"FastDiff is on: {_told(method)}" for method in self.methods]
        lines += [f"on {parts}" + (f": {armed} attention modules" if armed else "")]
        for denoiser in self._denoisers:
            lines += [f"left stock, no attention call to take over: {name}"
                      for name in denoiser.unsupported]
        return "\n".join([*lines, str(self.report)])

    def _arm(self) -> None:
        for denoiser in self._denoisers:
            denoiser.arm()

    def _drives(self, model: Any) -> bool:
        """Whether this handle was made for `model` itself, not for one it was copied from."""
        return any(held() is model for held in self._models)

    def _take_out(self) -> None:
        """Detach every method, last one first."""
        while self._detach:
            self._detach.pop()()

    def _watch_scheduler(self) -> None:
        scheduler = getattr(self._pipe(), "scheduler", None)
        if scheduler is None or scheduler_clock.armed(scheduler):
            return
        # the user replaced pipe.scheduler after enabling, and its run began unseen
        scheduler_clock.disarm_scheduler(self._scheduler)
        scheduler_clock.arm_scheduler(scheduler, self.clock)
        self._scheduler = scheduler
        if getattr(scheduler, "timesteps", None) is not None:
            self.clock.begin(len(scheduler.timesteps))


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


def enable(
    target: Any, /, *methods: str | Method, plan: str | Path | dict[str, Any] | None = None,
    strict: bool | None = None, **options: Any,
) -> Handle:
    """Switch FastDiff on for a pipeline, a ModularPipeline or a bare diffusers model.

    methods: presets ("quality", "balanced", "turbo"), method names, or methods; at most one for
        attention and one for sampling; nothing means "balanced". options: knobs, each given to the
        method that has it; "method.knob" says which. plan: a calibrated plan, file or dict.
    strict: raise where something would run stock without being asked to; None reads
        FASTDIFF_STRICT. Enabling again replaces. On error nothing is changed.

    A model shared by two pipelines is shared with its setting. Without a scheduler (a bare model)
    there is no step to count, so `dense_steps` does not apply.
    """
    if plan is not None and methods:
        raise ValueError("pass either methods or plan=, not both")
    chosen = make_methods(methods if plan is None else from_plan(plan), options)
    models = {name: Part(model, family_of(model) or GENERIC)
              for name, model in find_denoisers(target).items()}
    if strict is None:
        strict = os.environ.get("FASTDIFF_STRICT", "0").lower() not in ("", "0", "false", "no")
    disable(target)
    for part in models.values():
        disable(part.model)
    policy = next((method for method in chosen if isinstance(method, Policy)), None)
    session = Session(policy, StepClock(), strict=strict)
    handle = Handle(chosen, session, models)
    try:
        _enter(target, handle, session, models)
    except BaseException:
        disable(target)
        raise
    return handle


def _enter(target: Any, handle: Handle, session: Session, models: dict[str, Part]) -> None:
    for model, _ in models.values():
        object.__setattr__(model, HANDLE, handle)
        _watch_branch(model, session.clock)
    session.clock.on_begin(session.report.reset)
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        handle._pipe, handle._scheduler = ref(target), scheduler
        target.__dict__[HANDLE] = handle
        scheduler_clock.arm_scheduler(scheduler, session.clock)
        session.watch = handle._watch_scheduler
    if session.chosen is not None:
        handle._denoisers += [Denoiser(model, family.read, family.site, family.skip, session)
                              for model, family in models.values()]
        session.clock.on_begin(handle._arm)
        unsupported = [name for d in handle._denoisers for name in d.unsupported]
        if session.strict and unsupported:
            raise DenseFallbackError(
                f"attention of {', '.join(unsupported)} would stay stock: the processor calls "
                "neither diffusers' dispatcher nor torch's scaled_dot_product_attention. Strict "
                "mode is on; pass strict=False (or unset FASTDIFF_STRICT) to leave it stock.")
    pipe = None if isinstance(_unwrap(target), nn.Module) else target
    host = Host(pipe, models, session.clock, session.report, session.strict, session.stays_stock)
    for method in handle.methods:
        handle._detach.append(method.attach(host))


def disable(target: Any) -> None:
    """Take everything out again; the pipeline is then stock, bit for bit. Safe to call twice."""
    handle = getattr(target, "__dict__", {}).get(HANDLE)
    if handle is not None and (handle._pipe() is target or handle._drives(target)):
        handle._take_out()
    if handle is not None and handle._pipe() is target:
        # the one that was armed, should the user have replaced it since
        scheduler_clock.disarm_scheduler(handle._scheduler)
    scheduler_clock.disarm_scheduler(getattr(target, "scheduler", None))
    for model in _candidates(target).values():
        held = model.__dict__.pop(HANDLE, None)
        if held is not None:
            if held._drives(model):
                held._take_out()
            model.__dict__.pop("cache_context", None)
            disarm(model)
    getattr(target, "__dict__", {}).pop(HANDLE, None)
    # a copy of a wrapped pipeline is wrapped too
    unwrap_call(target)


def find_denoisers(target: Any) -> dict[str, nn.Module]:
    """The models to drive, by component name; a clear error when there is none."""
    found = _candidates(target)
    if not found:
        raise TypeError(
            f"{type(target).__name__} holds no model with attention that FastDiff knows how to "
            "enter. Pass a diffusers pipeline whose components are loaded, or a diffusers model. "
            f"Known families: {', '.join(f.name for f in families())}."
        )
    for name, model in found.items():
        if not any(supported(module.processor) for _, module in attention_modules(model)):
            raise ValueError(
                f"{name} ({type(model).__name__}) computes attention in a way FastDiff cannot "
                "take over: no processor calls diffusers' dispatcher or torch's "
                f"scaled_dot_product_attention. Known families: "
                f"{', '.join(f.name for f in families())}."
            )
    return found


def _candidates(target: Any) -> dict[str, nn.Module]:
    target = _unwrap(target)
    if isinstance(target, nn.Module):
        named = {"model": target}
    else:
        components = getattr(target, "components", None) or {}
        named = {
            name: _unwrap(part) for name, part in components.items()
            if isinstance(part, nn.Module) and not name.startswith(_NOT_DENOISERS)
        }
    found: dict[str, nn.Module] = {}
    for name, model in named.items():
        home = type(model).__module__
        is_diffusers = hasattr(model, "config") and home.startswith("diffusers.")
        is_diffusers = is_diffusers and not home.startswith(_NOT_DENOISER_HOMES)
        known = family_of(model) is not None
        fresh = all(model is not other for other in found.values())
        if fresh and (is_diffusers or known) and any(attention_modules(model)):
            found[name] = model
    return found


def _unwrap(module: Any) -> Any:
    if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        return module._orig_mod
    return module


def _watch_branch(model: nn.Module, clock: StepClock) -> None:
    """Learn the guidance branch from `model.cache_context(name)`, which many pipelines enter."""
    stock = getattr(type(model), "cache_context", None)
    if stock is None:
        return
    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any):
        before, clock.branch = clock.branch, name
        try:
            with stock(model, name, *args, **kwargs) as context:
                yield context
        finally:
            clock.branch = before

    model.__dict__["cache_context"] = cache_context


def handle_of(pipe: Any) -> Handle | Off:
    """The handle of an enabled pipeline, or one that says that FastDiff is off."""
    return pipe.__dict__.get(HANDLE) or Off()
