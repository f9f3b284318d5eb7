"""Upscale: one call of a pipeline in two stages, at its own size and at the target."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.method import Host, Part
from fastdiff.pipelines.families.base import Size
from fastdiff.pipelines.staged.accept import check_no_schedule
from fastdiff.pipelines.staged.call import AROUND, attributes
from fastdiff.pipelines.staged.stand_in import stand_in
from fastdiff.pipelines.upscale import schedule
from fastdiff.pipelines.upscale.cache import GuideCache
from fastdiff.pipelines.upscale.dual import DualPath, Sizes, Ways
from fastdiff.pipelines.upscale.encode import as_held, encoded, vae_in_tiles
from fastdiff.pipelines.upscale.families import Upscaling
from fastdiff.pipelines.upscale.refine import Checkpoint, Refinement
from fastdiff.pipelines.upscale.state import Folder, call_key, generators_of
from fastdiff.scheduler import CLOCK, arm_scheduler, armed

# on a pipeline: frames [B, F, 3, H, W] in 0..1 that take the place of stage one
CLIP = "_fastdiff_clip"


class Settings(Protocol):
    """The knobs of the method; see FreeSwim."""

    name: Any
    target: Any
    mode: str
    interval: int
    strength: float
    shift: float | None
    scale_mult: float
    slide: str
    cache: str
    folder: str | None

    def to_dict(self) -> dict[str, Any]: ...


class Upscale:
    """What is decided and made when a call begins."""

    def __init__(self, method: Any, host: Host, pipe: Any, models: dict[str, Part],
                 upscaling: Upscaling) -> None:
        self.method: Settings = method
        self.host, self.pipe, self.models, self.upscaling = host, pipe, models, upscaling
        self.part = next(iter(models.values()))

    def begin(self, asked: dict[str, Any], stack: ExitStack) -> None:
        """Make the clip, and turn the call that follows into its refinement.

        asked: arguments of the call by name, changed in place. stack: closed after the call.
        """
        self._check(asked)
        method, pipe = self.method, self.pipe
        clip = pipe.__dict__.get(CLIP)
        folder = self._folder(asked, clip)
        frames, stopped = self._first(asked, clip, folder)
        size, native = self._size(), self._native(asked, frames)
        grown = math.sqrt(size.height * size.width / math.prod(native))
        shift = self._shift(grown)
        fresh = self._scheduler(shift)
        self._check_frames(asked, frames)
        steps = asked["num_inference_steps"]
        kept = schedule.kept_steps(steps, method.strength)
        # read after the clip, whose generators it may move on
        resumed = None if folder is None else folder.checkpoint(fresh)

        def clean(like: Tensor) -> Tensor:
            latents = encoded(pipe, self.upscaling, frames, size)
            return as_held(self.part.model, self._staging, self.upscaling, latents, size, like)

        run = Refinement(
            fresh(), steps, kept, shift, grown, clean, self.host.clock,
            lambda share: self._begun(native, frames, kept, steps, share, resumed, stopped),
            self._saving(folder, kept), resumed, stopped)
        left = kept - (0 if resumed is None else resumed.done)
        asked.update(height=size.height, width=size.width, num_inference_steps=left)
        asked.update({name: native for name in self.upscaling.as_trained
                      if name in asked and asked[name] is None})
        if asked.get("latents") is not None:
            # they were the noise of stage one
            asked["latents"] = None
        self._enter(run, native, stack)
        stack.enter_context(vae_in_tiles(pipe.vae, size))
        if folder is not None:
            stack.push(lambda kind, *_: folder.finish() if kind is None and (
                stopped or not _interrupted(pipe)) else None)

    def _check(self, asked: dict[str, Any]) -> None:
        check_no_schedule(asked, f"does {self.method.name}")
        schedule.check_shift(self.pipe.scheduler, self._given_shift())
        if asked.get("height") and asked.get("width"):
            self._check_grown(asked["height"], asked["width"])
        for name, part in self.models.items():
            model: Any = part.model
            if getattr(model, "is_cache_enabled", False):
                raise ValueError(f"a cache is enabled on {name}, which remembers batches of one "
                                 "size: disable_cache() first")
            if isinstance(getattr(self.pipe, name), torch._dynamo.eval_frame.OptimizedModule) or \
                    any(m.__dict__.get("_compiled_call_impl") for m in model.modules()):
                raise ValueError(f"{name} is compiled, and freeswim changes what its layers do "
                                 "from step to step: run it without torch.compile")

    @property
    def _staging(self) -> Any:
        return self.part.family.staging

    def _size(self) -> Size:
        height, width = self.method.target
        cell = self._staging.cell(self.pipe)
        return Size(height, width, height // cell, width // cell)

    def _given_shift(self) -> float | None:
        return self.upscaling.shift if self.method.shift is None else self.method.shift

    def _shift(self, grown: float) -> float | None:
        given = self._given_shift()
        return schedule.shift_for(self.pipe.scheduler, grown) if given is None else given

    def _scheduler(self, shift: float | None) -> Callable[[], Any]:
        scheduler = self.pipe.scheduler
        if not armed(scheduler):
            # replaced since enable
            arm_scheduler(scheduler, self.host.clock)
        return lambda: schedule.rebuilt(scheduler, shift)

    def _folder(self, asked: dict[str, Any], clip: Tensor | None) -> Folder | None:
        root = self.method.folder
        if root is None:
            return None
        about = {k: v for k, v in self.method.to_dict().items() if k not in ("folder", "cache")}
        others = {name: value for name, value in asked.items() if name != "generator"}
        generators = generators_of(asked)
        key = call_key(self.pipe, about, {**others, "clip": clip, "generator": generators})
        return Folder(root, key, generators)

    def _first(
        self, asked: dict[str, Any], clip: Tensor | None, folder: Folder | None
    ) -> tuple[Tensor, bool]:
        """The clip of stage one: given, made before, or made now, [B, F, 3, H, W] in 0..1.

        And whether the user stopped it before its end.
        """
        if clip is not None:
            return clip, False
        found = None if folder is None else folder.clip()
        if found is not None:
            return found, False
        call = {**asked, "output_type": "pt", "return_dict": True}
        call.pop("self", None)
        with attributes(self.pipe, **{AROUND: None}):
            made = self.pipe(**call)
        frames = getattr(made, "frames", None)
        frames = made.images[:, None] if frames is None else frames
        stopped = _interrupted(self.pipe)
        if folder is not None and not stopped:
            folder.save_clip(frames)
        return frames, stopped

    def _native(self, asked: dict[str, Any], frames: Tensor) -> tuple[int, int]:
        """The trained size in pixels: that of the clip made, or what the call of a given one says.
        """
        height, width = asked.get("height"), asked.get("width")
        if CLIP not in self.pipe.__dict__ or not height or not width:
            height, width = frames.shape[-2:]
        self._check_grown(height, width)
        return int(height), int(width)

    def _check_grown(self, height: int, width: int) -> None:
        target = self.method.target
        if height > target[0] or width > target[1]:
            raise ValueError(
                f"target={target[0]}x{target[1]} is smaller than the size of the call, {height}x"
                f"{width}: height and width are those of the first stage, at which the model was "
                "trained, and the target is at least as large")

    def _check_frames(self, asked: dict[str, Any], frames: Tensor) -> None:
        count = frames.shape[1]
        if "num_frames" not in asked:
            if count != 1:
                raise ValueError(f"{type(self.pipe).__name__} makes pictures, and the clip has "
                                 f"{count} frames")
            return
        factor = (getattr(self.pipe, "vae_scale_factor_temporal", None)
                  or getattr(self.pipe, "vae_temporal_compression_ratio", None) or 1)
        if (count - 1) % factor:
            below = (count - 1) // factor * factor + 1
            raise ValueError(f"a clip of {count} frames is not possible: accepted is {factor} n + "
                             f"1; the nearest are {below} and {below + factor}")
        asked["num_frames"] = count

    def _saving(self, folder: Folder | None, kept: int) -> Callable[[Checkpoint], None]:
        method = self.method

        def saved(checkpoint: Checkpoint) -> None:
            # between guide steps what the guide said is in memory only
            guided = method.mode != "cache" or checkpoint.done % method.interval == 0
            if folder is not None and (guided or checkpoint.done == kept):
                folder.save(checkpoint)

        return saved

    def _enter(self, run: Refinement, native: tuple[int, int], stack: ExitStack) -> None:
        pipe, method, report = self.pipe, self.method, self.host.report
        prepare = pipe.prepare_latents
        scheduler = stand_in(run.scheduler, run)
        object.__setattr__(scheduler, CLOCK, run.clock)
        stack.enter_context(attributes(
            pipe, scheduler=scheduler,
            prepare_latents=lambda *a, **k: run.prepare_latents(prepare, a, k)))
        place = method.cache if method.mode == "cache" else "none"
        told = (lambda where: report.tell(method.name, "guide kept", where)) \
            if method.mode == "cache" else (lambda where: None)
        dual = DualPath(
            Ways(method.mode, method.interval, method.slide, method.scale_mult),
            Sizes(native, method.target, self._token()), run.clock, GuideCache(place, told),
            self.upscaling.cross,
            lambda: bool(getattr(pipe, "do_classifier_free_guidance", False)),
            lambda what: report.count(method.name, what))
        dual.on_plan = lambda plan: report.tell(
            method.name, "windows", f"{_sides(plan.axes)} of {plan.layout.grid[1]}x"
            f"{plan.layout.grid[2]} tokens, by {'token' if plan.single else 'tile'} {plan.tile}, "
            f"density {plan.density:.3f}")
        dual.on_gather = lambda reason: report.explain(method.name, "gathered because", reason)
        stack.enter_context(dual.entered(self.models))

    def _token(self) -> int:
        model: nn.Module = self.part.model
        return self._staging.cell(self.pipe) * self._staging.unit(model)

    def _begun(self, native: tuple[int, int], frames: Tensor, kept: int, steps: int, share: float,
               resumed: Checkpoint | None, stopped: bool) -> None:
        def say(what: str, value: str) -> None:
            self.host.report.tell(self.method.name, what, value)

        target = self.method.target
        given = "given" if CLIP in self.pipe.__dict__ else "made"
        say("stage 1", f"{frames.shape[1]} frames of {frames.shape[-2]}x{frames.shape[-1]}, "
            f"{given}")
        say("stage 2", f"{target[0]}x{target[1]}, {kept} of {steps} steps, noise {share:.3f}, "
            f"{self.method.mode}")
        if resumed is not None:
            say("gone on", f"after step {resumed.done} of {kept}")
        if stopped:
            # the pipeline, which forgot it when its call began, asks before every step
            self.pipe._interrupt = True
            say("stopped", "in stage 1; what it had is resized")
        stretched = (target[0] / target[1]) / (native[0] / native[1])
        if not 0.95 < stretched < 1.05:
            say("shape", f"{native[0]}x{native[1]} is stretched to the target's shape")


def _interrupted(pipe: Any) -> bool:
    return bool(getattr(pipe, "_interrupt", False))


def _sides(axes: tuple[Any, Any]) -> str:
    return "x".join(str(int((axis.high - axis.low)[0])) for axis in axes)
