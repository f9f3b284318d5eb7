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
from fastdiff.attention import Session
from fastdiff.clock import StepClock
from fastdiff.config import from_plan, make_policy, to_plan
from fastdiff.pipelines.families import families, family_of
from fastdiff.pipelines.families.generic import GENERIC
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

    def __init__(self, session: Session, denoisers: list[Denoiser], names: dict[str, str]) -> None:
        self._session = session
        self._denoisers = denoisers
        self._names = names
        # weak: the last layer that ran is remembered, and would keep every weight alive
        self._pipe: Callable[[], Any] = lambda: None
        self._scheduler: Any = None

    def __deepcopy__(self, memo: dict) -> "Handle":
        # a copied model must not copy the whole pipeline with it
        return self

    @property
    def enabled(self) -> bool:
        return True

    @property
    def policy(self) -> Policy:
        return self._session.policy

    @property
    def report(self) -> Report:
        """The last run: per layer density, operations, seconds, dense calls and why."""
        return self._session.report

    @property
    def clock(self) -> StepClock:
        return self._session.clock

    def plan(self) -> dict[str, Any]:
        """Settings as plain data; `enable_fastdiff(plan=...)` takes it back."""
        return to_plan(self.policy)

    def __repr__(self) -> str:
        policy = self.policy
        shown = {k: v for k, v in policy.to_dict().items() if k != "method" and v is not None}
        options = ", ".join(f"{k}={v}" for k, v in shown.items())
        parts = ", ".join(f"{name} ({family})" for name, family in self._names.items())
        armed = sum(len(d.layers) for d in self._denoisers)
        lines = [f"FastDiff is on: {policy.name} ({options})",
                 f"on {parts}: {armed} attention modules"]
        for denoiser in self._denoisers:
            lines += [f"left stock, no attention call to take over: {name}"
                      for name in denoiser.unsupported]
        return "\n".join([*lines, str(self.report)])

    def _arm(self) -> None:
        for denoiser in self._denoisers:
            denoiser.arm()

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


class Off:
    """`pipe.fastdiff` of a pipeline that runs stock."""

    enabled = False

    def __repr__(self) -> str:
        return "FastDiff is off: this pipeline runs stock"


def enable(
    target: Any, *methods: str | Policy, plan: str | Path | dict[str, Any] | None = None,
    strict: bool | None = None, **options: Any,
) -> Handle:
    """Switch FastDiff on for a pipeline, a ModularPipeline or a bare diffusers model.

    methods: a preset ("quality", "balanced", "turbo"), a method name, or a policy; nothing means
        "balanced". options: knobs of that method. plan: a calibrated plan, file or dict.
    strict: raise where attention would run dense without being asked to; None reads
        FASTDIFF_STRICT. Enabling again replaces. On error nothing is changed.

    A model shared by two pipelines is shared with its setting. Without a scheduler (a bare model)
    there is no step to count, so `dense_steps` does not apply.
    """
    policy = _policy(methods, plan, options)
    models = find_denoisers(target)
    if strict is None:
        strict = os.environ.get("FASTDIFF_STRICT", "0").lower() not in ("", "0", "false", "no")
    disable(target)
    session = Session(policy, StepClock(), strict=strict)
    denoisers, names = [], {}
    for name, model in models.items():
        disable(model)
        family = family_of(model) or GENERIC
        denoisers.append(Denoiser(model, family.read, family.site, family.skip, session))
        names[name] = family.name
    handle = Handle(session, denoisers, names)
    for model in models.values():
        object.__setattr__(model, HANDLE, handle)
        _watch_branch(model, session.clock)
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        handle._pipe, handle._scheduler = ref(target), scheduler
        target.__dict__[HANDLE] = handle
        scheduler_clock.arm_scheduler(scheduler, session.clock)
        session.watch = handle._watch_scheduler
    session.clock.on_begin(session.report.reset)
    session.clock.on_begin(handle._arm)
    return handle


def disable(target: Any) -> None:
    """Take everything out again; the pipeline is then stock, bit for bit. Safe to call twice."""
    handle = getattr(target, "__dict__", {}).get(HANDLE)
    if handle is not None and handle._pipe() is target:
        # the one that was armed, should the user have replaced it since
        scheduler_clock.disarm_scheduler(handle._scheduler)
    scheduler_clock.disarm_scheduler(getattr(target, "scheduler", None))
    for model in _candidates(target).values():
        if model.__dict__.pop(HANDLE, None) is not None:
            model.__dict__.pop("cache_context", None)
            disarm(model)
    getattr(target, "__dict__", {}).pop(HANDLE, None)


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


def _policy(methods: tuple, plan: Any, options: dict[str, Any]) -> Policy:
    if plan is not None:
        if methods:
            raise ValueError("pass either a method or plan=, not both")
        policy = from_plan(plan)
        return make_policy(policy, options) if options else policy
    if len(methods) > 1:
        names = ", ".join(getattr(m, "name", str(m)) for m in methods)
        raise ValueError(f"one attention method at a time, got {len(methods)}: {names}")
    return make_policy(methods[0] if methods else None, options)


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
