"""enable and disable, the two pipeline methods."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastdiff import scheduler as scheduler_clock
from fastdiff.attention import DenseFallbackError, Session
from fastdiff.clock import StepClock
from fastdiff.config import from_plan, make_methods
from fastdiff.handle import HANDLE, Handle, Off, forget, handle_of, release
from fastdiff.method import Host, Method, Part, held
from fastdiff.pipelines.families import families, family_of
from fastdiff.pipelines.families.generic import GENERIC
from fastdiff.policies import Policy
from fastdiff.seam import Denoiser, attention_modules, before_forward
from fastdiff.shadow import supported

# parts of a pipeline that hold attention and are not the denoiser
_NOT_DENOISERS = ("vae", "vqvae", "controlnet", "text_encoder", "image_encoder", "safety_checker")
_NOT_DENOISER_HOMES = ("diffusers.models.autoencoders.", "diffusers.models.controlnets.")


def enable(
    target: Any, /, *methods: str | Method,
    plan: str | os.PathLike[str] | dict[str, Any] | None = None, strict: bool | None = None,
    **options: Any,
) -> Handle:
    """Switch FastDiff on for a pipeline, a ModularPipeline or a bare diffusers model.

    methods: presets ("quality", "balanced", "turbo"), method names, or methods; at most one for
        attention and one for sampling; nothing means "balanced". options: knobs, each given to the
        method that has it; "method.knob" says which. plan: a calibrated plan, file or dict.
    strict: raise where something would run stock without being asked to; None reads
        FASTDIFF_STRICT. Enabling again replaces. On error the settings from before stay on.

    A model shared by two pipelines is shared with its setting. Without a scheduler (a bare model)
    there is no step to count, so `dense_steps` does not apply: in a loop of your own pass an object
    with both, SimpleNamespace(components={"transformer": model}, scheduler=scheduler).
    """
    if plan is not None and methods:
        raise ValueError("pass either methods or plan=, not both")
    chosen = make_methods(methods if plan is None else from_plan(plan), options)
    models = {name: Part(model, family_of(model) or GENERIC)
              for name, model in find_denoisers(target).items()}
    if strict is None:
        strict = os.environ.get("FASTDIFF_STRICT", "0").lower() not in ("", "0", "false", "no")
    before = handle_of(target)
    owner = _owner(before)
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
        if owner is not None and isinstance(before, Handle):
            enable(owner, *before.methods, strict=before.strict)
        raise
    return handle


@contextmanager
def as_before(target: Any) -> Iterator[tuple[tuple[Method, ...], bool | None]]:
    """Put back, in the end, what is on now, where it was. Gives its methods and `strict`."""
    handle = handle_of(target)
    # may be another pipeline, which shares the model
    owner = _owner(handle)
    on = (handle.methods, handle.strict) if isinstance(handle, Handle) else ((), None)
    try:
        yield on
    finally:
        disable(target)
        if owner is not None:
            enable(owner, *on[0], strict=on[1])


def _owner(handle: Handle | Off) -> Any:
    """The pipeline or model that this handle was made for."""
    if isinstance(handle, Off):
        return None
    pipe = handle._pipe()
    return pipe if pipe is not None else next((held() for held in handle._models.values()), None)


def _enter(target: Any, handle: Handle, session: Session, models: dict[str, Part]) -> None:
    for model, _ in models.values():
        object.__setattr__(model, HANDLE, handle)
        _watch_branch(model, session.clock)
    session.clock.on_begin(session.report.reset)
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        handle._pipe, handle._scheduler = held(target), scheduler
        target.__dict__.update({HANDLE: handle, "__deepcopy__": _copying(handle)})
        scheduler_clock.arm_scheduler(scheduler, session.clock)
        session.watch = handle._watch_scheduler
        session.clock.on_begin(handle._tell_replaced)
        for model, _ in models.values():
            before_forward(model, handle._watch_scheduler)
    if session.chosen is not None:
        several = len(models) > 1
        handle._denoisers += [
            Denoiser(model, family.read, family.site, family.skip, session,
                     f"{name}." if several else "")
            for name, (model, family) in models.items()]
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
    if handle is not None and handle._pipe() is target:
        handle._close()
    for model in _candidates(target).values():
        held = model.__dict__.get(HANDLE)
        if held is not None and held._drives(model):
            held._release(model)
        elif held is not None:
            release(model)
    # what a copy brought with it
    scheduler_clock.disarm_scheduler(getattr(target, "scheduler", None))
    forget(target)


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
        processors = [module.processor for _, module in attention_modules(model)]
        if not any(supported(processor) for processor in processors):
            kinds = ", ".join(sorted({type(processor).__name__ for processor in processors}))
            raise ValueError(
                f"{name} ({type(model).__name__}) computes attention in a way FastDiff cannot "
                f"take over: its processors ({kinds}) call neither diffusers' dispatcher nor "
                "torch's scaled_dot_product_attention. Switch attention slicing and xFormers off "
                "(disable_attention_slicing, disable_xformers_memory_efficient_attention) where "
                f"they are on. Known families: {', '.join(f.name for f in families())}."
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
    def cache_context(self: nn.Module, name: str, *args: Any, **kwargs: Any):
        before, clock.branch = clock.branch, name
        try:
            with stock(self, name, *args, **kwargs) as context:
                yield context
        finally:
            clock.branch = before

    # a method, so that a copied model enters its own context
    model.__dict__["cache_context"] = MethodType(cache_context, model)


def _copying(handle: Handle) -> Callable[[dict], Any]:
    """The `__deepcopy__` of a pipeline that is on: a copy has a clock and a report of its own."""

    def deep_copy(memo: dict) -> Any:
        pipe = handle._pipe()
        held = pipe.__dict__.pop("__deepcopy__")
        try:
            twin = copy.deepcopy(pipe, memo)
        finally:
            pipe.__dict__["__deepcopy__"] = held
        enable(twin, *handle.methods, strict=handle.strict)
        return twin

    return deep_copy
