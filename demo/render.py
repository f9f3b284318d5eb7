"""Renderer: the loaded model; makes what was wished for, stock beside fast, and what it tells."""

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastdiff import models
from fastdiff.api import disable, enable, find_denoisers
from fastdiff.cli import choice, job, sampling
from fastdiff.cli.show import Show
from fastdiff.cli.sidecar import Settings
from fastdiff.demo.density import Trace
from fastdiff.demo.preview import Preview
from fastdiff.demo.recording import Recorder, Recording
from fastdiff.demo.wish import Wish
from fastdiff.demo.worker import Ticket
from fastdiff.method import Method

PREVIEW_EVERY = 0.4  # seconds


@dataclass(frozen=True)
class Made:
    """What came out. fast: with the methods, or the one result when there are none.

    report: `Report.summary()`, table: density by layer and step, told: `print(pipe.fastdiff)`.
    """

    wish: Wish
    settings: Settings
    fast: sampling.Result
    stock: sampling.Result | None
    report: dict[str, Any] | None
    table: dict[str, Any] | None
    told: str


class Renderer:
    """One pipeline. Only the worker's thread may call `make` and `set_right`."""

    def __init__(self, name: str, device: str | None, dtype: str | None, offload: bool) -> None:
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if offload:
            given["offload"] = True
        self.model = models.find(name)
        self._job = job.Job([], model=name, device=device, given=given, method=choice.STOCK)
        settings = self._job.settings(self.model)
        self.pipe: Any = job.load(self.model, settings, Show(), safetensors=True)
        # a model that FastDiff cannot enter is refused here, with the reason
        find_denoisers(self.pipe)
        self.device, self.dtype = settings.device, settings.dtype
        self.preview = Preview()
        self._ticket: Ticket | None = None
        self._warm: set[Any] = set()
        self._watch()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the model makes, the usual one first."""
        clips = "num_frames" in sampling.parameters(self.pipe)
        return self.model.defaults.kind or (("video", "image") if clips else ("image",))

    def accepts(self, argument: str) -> bool:
        return argument in sampling.parameters(self.pipe)

    def settings(self, wish: Wish) -> Settings:
        """All that decides the result, or an InputError that says what is possible."""
        asked = replace(self._job, kind=wish.kind, given={**self._job.given, **wish.given})
        settings = asked.settings(self.model)
        settings = replace(settings, prompt=wish.prompt.strip(), plan=wish.plan,
                           method=choice.title(wish.plan))
        sampling.check_size(settings, self.model.defaults.multiple,
                            self.model.defaults.frame_factor)
        return job.fit(self.pipe, settings, asked.typed - {"dtype", "offload"})

    def make(self, wish: Wish, ticket: Ticket) -> Made:
        """Run it; with `compare` and a method, stock first."""
        settings = self.settings(wish)
        stock = None
        if wish.compare and settings.plan is not None:
            if settings.device != "cpu":
                self._warm_up(settings, ticket)
            stock, _ = self.sample(replace(settings, plan=None), ticket, "stock")
        fast, trace = self.sample(settings, ticket, choice.title(settings.plan))
        handle = self.pipe.fastdiff
        made = Made(wish, fast.settings, fast, stock,
                    handle.report.summary() if handle.enabled else None,
                    trace.table(handle.report) if handle.enabled else None, repr(handle))
        disable(self.pipe)
        return made

    def record(self, wish: Wish, recording: Recording, ticket: Ticket) -> None:
        """A dense run whose attention calls are recorded."""
        settings = self.settings(replace(wish, plan=None))
        recorder = Recorder(recording=recording, min_tokens=1, max_density=1.0)
        result, _ = self.sample(settings, ticket, "recording", recorder)
        recording.frames = result.frames
        disable(self.pipe)

    def sample(
        self, settings: Settings, ticket: Ticket, phase: str, method: Method | None = None
    ) -> tuple[sampling.Result, Trace]:
        """One run of the pipeline, on with `ticket`'s progress, preview and end.

        method: in place of the settings' plan.
        """
        ticket.enter(phase, settings.steps or 0)
        self._ticket = ticket
        trace, last = Trace(), {"at": -PREVIEW_EVERY, "latents": None}
        self.preview.begin()

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            ticket.check()
            ticket.step = step + 1
            ticket.steps = getattr(pipe, "num_timesteps", None) or ticket.steps
            if pipe.fastdiff.enabled:
                trace.mark(pipe.fastdiff.report)
            latents = tensors.get("latents")
            if isinstance(latents, torch.Tensor):
                last["latents"] = latents
                clean = self.preview.clean(latents, getattr(pipe, "scheduler", None), step)
                if ticket.elapsed - last["at"] > PREVIEW_EVERY:
                    last["at"] = ticket.elapsed
                    ticket.preview = self.preview.picture(clean) or ticket.preview
            return tensors

        changes = {"callback_on_step_end": after_step} if self.accepts(
            "callback_on_step_end") else {}
        try:
            if method is None:
                job.switch(self.pipe, settings)
            else:
                enable(self.pipe, method)
            result = sampling.sample(self.pipe, settings, lambda step, of: None, **changes)
        finally:
            self._ticket = None
        if last["latents"] is not None:
            self.preview.fit(last["latents"], result.frames)
        return result, trace

    def warm_up(self, ticket: Ticket) -> None:
        """A short run at the start, so that the first visitor does not wait for it."""
        kind = "image" if "image" in self.kinds else self.kinds[0]
        self.sample(self.settings(Wish(kind, "a red apple", steps=3)), ticket, "warm-up")

    def set_right(self) -> None:
        """After a run that did not finish: stock again, and memory given back."""
        disable(self.pipe)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _warm_up(self, settings: Settings, ticket: Ticket) -> None:
        """Compile and tune what both ways run, untimed; once for each shape and plan."""
        key = (settings.kind, settings.height, settings.width, settings.frames, str(settings.plan))
        if key in self._warm:
            return
        short = replace(settings, steps=2)
        for plan in (job.soon(settings.plan), None):
            self.sample(replace(short, plan=plan), ticket, "warm-up")
        self._warm.add(key)

    def _watch(self) -> None:
        """Ask before each block of each part whether the job shall go on."""
        def before(module: nn.Module, arguments: Any) -> None:
            if self._ticket is not None:
                self._ticket.check()

        for block in _blocks(self.pipe):
            block.register_forward_pre_hook(before)


def _blocks(pipe: Any) -> list[nn.Module]:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    lists = [inner for part in parts for inner in part.modules()
             if isinstance(inner, nn.ModuleList)]
    # a list may have gaps, such as a UNet's levels without attention
    return [*parts, *(block for blocks in lists for block in blocks if block is not None)]

