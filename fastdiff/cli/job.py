"""One call of `fastdiff generate`, from checks that need no weights to written files."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastdiff import models
from fastdiff.cli import choice, output, sampling, sidecar, values
from fastdiff.cli.errors import InputError
from fastdiff.cli.show import Show, hush
from fastdiff.cli.sidecar import Settings

FPS = 16


@dataclass(frozen=True)
class Job:
    """What was asked for. given: settings by name, as far as they were typed."""

    prompts: list[str]
    model: str | None = None
    kind: str | None = None
    method: str | None = None
    plan_file: Path | None = None
    options: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    given: dict[str, Any] = field(default_factory=dict)
    sidecar: Path | None = None
    compare: bool = False
    out: Path | None = None
    overwrite: bool = False
    command_line: list[str] = field(default_factory=list)

    def run(self, show: Show) -> None:
        before = {} if self.sidecar is None else sidecar.read(self.sidecar)
        prompts = self.prompts or [before["prompt"]] if before else self.prompts
        if not prompts:
            raise InputError("nothing to make: give a PROMPT, or --from a sidecar")
        for text in (*prompts, self.given.get("negative", "")):
            values.writable("the prompt", text)
        places, named_kind = output.places(self.out, len(prompts), self.overwrite)
        model = models.find(self.model or before.get("model") or models.FIRST)
        settings = self.settings(model, before, named_kind)
        sampling.check_size(settings, model.defaults.multiple, model.defaults.frame_factor)
        if settings.kind == "video":
            output.check_ffmpeg()
        if before:
            found = sidecar.differences(before, model.sha256 if model.shipped else None)
            if found:
                show.note(f"the result may differ from before: {'; '.join(found)}")
        pipe = load(model, settings, show)
        settings = fit(pipe, settings, self.typed)
        records: list[dict[str, Any]] = []
        used: set[Path] = set()
        for prompt, place in zip(prompts, places, strict=True):
            settings = replace(settings, prompt=prompt)
            records.append(_Run(self, pipe, model, settings, place, show, used).make())
        show.results(records)

    @property
    def typed(self) -> set[str]:
        """Names of the settings that were given a value."""
        return {"size" if name in ("height", "width") else name for name in self.given}

    def settings(
        self, model: models.Model, before: Mapping[str, Any] = MappingProxyType({}),
        named: str | None = None,
    ) -> Settings:
        """Typed, else from the sidecar `before`, else what the model makes best.

        named: the kind that the output's name says.
        """
        if not math.isfinite(self.given.get("guidance", 0)):
            raise InputError(f"--guidance {self.given['guidance']}: accepted is a finite number")
        if not -2**63 <= self.given.get("seed", 0) < 2**63:
            raise InputError(f"--seed {self.given['seed']}: accepted is {-2**63} to {2**63 - 1}")
        best = model.defaults
        kind = self._kind(before, best, named)
        same = self.model is None or self.model == before.get("model")
        earlier = before if same else {"prompt": before.get("prompt")}
        plan = choice.plan(self.method, self.plan_file, self.options, before.get("plan"))
        untouched = not (self.method or self.plan_file or self.options)
        if before and before["plan"] is None and untouched:
            plan = None
        if plan is None and self.compare:
            raise InputError("--compare needs a method other than stock")
        if self.compare and choice.upscales(plan):
            raise InputError("--compare holds two results of one size side by side, and upscaling "
                             "makes another size: leave --compare out")
        device = self._device(before)
        if self.given.get("offload") and device == "cpu":
            raise InputError("--offload moves parts to a GPU and back: it needs one")
        base = {
            "prompt": "", "negative": None, "seed": 0, "steps": best.steps,
            "guidance": best.guidance, "height": best.height, "width": best.width,
            "frames": best.frames, "fps": best.fps or 0, "offload": False, "strict": False,
            "dtype": "float32" if device == "cpu" else "bfloat16", "call": best.arguments,
        }
        merged = {name: self.given.get(name, earlier.get(name, default))
                  for name, default in base.items()}
        merged["offload"] = merged["offload"] and device != "cpu"
        if kind == "image":
            merged["frames"] = 1
        elif kind != before.get("kind", kind) and "frames" not in self.given:
            merged["frames"] = best.frames
        label = self.method or (str(self.plan_file) if self.plan_file else None)
        return Settings(**merged, model=model.name, kind=kind, plan=plan, device=device,
                        method=label or before.get("method") or "balanced")

    def _kind(self, before: Mapping[str, Any], best: models.Defaults, named: str | None) -> str:
        if self.kind and named and self.kind != named:
            raise InputError(f"--{self.kind} writes {output.SUFFIX[self.kind]} files, but the "
                             f"output is {str(self.out)!r}")
        kind = self.kind or named or before.get("kind") or (best.kind[0] if best.kind else "")
        if kind and best.kind and kind not in best.kind:
            raise InputError(f"the model makes only {best.kind[0]}s: use --{best.kind[0]}")
        if kind == "image" and self.given.get("frames", 1) != 1:
            raise InputError("a picture has one frame: leave --frames out, or use --video")
        return kind

    def _device(self, before: Mapping[str, Any]) -> str:
        if self.device is None and before:
            try:
                return values.device(before["device"])
            except InputError:
                return values.device("auto")
        return values.device(self.device or "auto")


def load(
    model: models.Model, settings: Settings, show: Show, safetensors: bool = False
) -> Any:
    """The pipeline that `settings` asks for, on its device, quiet."""
    show.note(f"loading {model.name} ({settings.dtype} on {settings.device})")
    hush()
    at = "cpu" if settings.offload else settings.device
    pipe = models.load(model, at, settings.dtype, safetensors)
    if settings.offload:
        pipe.enable_model_cpu_offload(device=settings.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fit(
    pipe: Any, settings: Settings, typed: Set[str], supplied: Set[str] = frozenset()
) -> Settings:
    """What only the loaded pipeline knows: its kind, legal sizes, arguments.

    typed: names of settings that were given a value. supplied: arguments of the pipeline's call
    that come besides the settings.
    """
    accepted = sampling.parameters(pipe)
    if not settings.kind:
        settings = replace(settings, kind="video" if "num_frames" in accepted else "image")
        if settings.kind == "video":
            output.check_ffmpeg()
    if not settings.fps:
        default = getattr(accepted.get("frame_rate"), "default", None)
        fps = int(default) if isinstance(default, (int, float)) else FPS
        settings = replace(settings, fps=fps)
    sampling.check_pipeline(pipe, settings, typed, supplied)
    if "size" in typed and "use_resolution_binning" in accepted:
        # a size that was asked for is made as asked
        settings = replace(settings, call={**settings.call, "use_resolution_binning": False})
    sampling.check_size(settings, *sampling.size_rules(pipe))
    return settings


def switch(pipe: Any, settings: Settings) -> None:
    """Turn the pipeline to the methods of `settings`; stock for none."""
    from fastdiff.api import disable, enable

    if settings.plan is None:
        disable(pipe)
        return
    try:
        enable(pipe, plan=settings.plan, strict=settings.strict or None)
    except (TypeError, ValueError) as error:
        raise InputError(f"{error} (--method stock runs without FastDiff)") from error


@dataclass(frozen=True)
class _Run:
    """One prompt."""

    job: Job
    pipe: Any
    model: models.Model
    settings: Settings
    place: output.Place
    show: Show
    used: set[Path]

    def make(self) -> dict[str, Any]:
        stock = self._stock() if self.job.compare else None
        switch(self.pipe, self.settings)
        plan = self.settings.plan
        with self.show.steps(choice.title(plan)) as bar:
            result = sampling.sample(self.pipe, self.settings, bar)
        settings = result.settings
        report = None if settings.plan is None else self.pipe.fastdiff.report.summary()
        about = {**settings.to_dict(), "versions": sidecar.versions(),
                 "model_sha256": self.model.sha256 if self.model.shipped else None}
        path = self._write(result, about)
        self.used.add(path)
        record = sidecar.record(path, settings, self.model, self.pipe, result.seconds, report,
                                self.job.command_line)
        if stock is not None:
            record["compare"] = self._write_comparison(path, stock, result, about)
        output.write_json(output.sidecar_of(path), record)
        record = {**record, "path": str(path)}
        self.show.result(record, None if report is None else repr(self.pipe.fastdiff))
        return record

    def _write(self, result: sampling.Result, about: dict[str, Any]) -> Path:
        """Write the result; where another run takes the name meanwhile, under the next one."""
        settings = result.settings
        while True:
            path = self.place.path(settings.kind, settings.prompt, settings.seed, self.used)
            try:
                output.write(path, result.frames, settings.fps, about, not self.place.overwrite)
            except FileExistsError:
                continue
            return path

    def _stock(self) -> sampling.Result:
        """The stock result; both ways have run two steps before a clock starts."""
        short = replace(self.settings, steps=2)
        accepted = sampling.parameters(self.pipe)
        latents = {"output_type": "latent"} if "output_type" in accepted else {}
        with self.show.steps("warm-up") as bar:
            switch(self.pipe, replace(short, plan=soon(short.plan)))
            sampling.sample(self.pipe, short, bar, **latents)
            switch(self.pipe, replace(short, plan=None))
            sampling.sample(self.pipe, short, bar, **latents)
        with self.show.steps("stock") as bar:
            return sampling.sample(self.pipe, self.settings, bar)

    def _write_comparison(
        self, path: Path, stock: sampling.Result, fast: sampling.Result, about: dict[str, Any]
    ) -> dict[str, Any]:
        near = output.psnr(stock.frames, fast.frames)
        told = "equal" if math.isinf(near) else f"{near:.1f} dB"
        captions = (f"stock {stock.seconds:.1f} s",
                    f"{choice.describe(self.settings.plan)}, {fast.seconds:.1f} s, {told}")
        both = output.side_by_side(stock.frames, fast.frames, captions)
        fps = self.settings.fps
        output.write(output.beside(path, "stock"), stock.frames, fps,
                     {**about, "method": choice.STOCK, "plan": None})
        output.write(output.beside(path, "compare"), both, fps, about)
        return {
            "stock": str(output.beside(path, "stock")),
            "side_by_side": str(output.beside(path, "compare")),
            "stock_seconds": stock.seconds,
            "speedup": stock.seconds / fast.seconds,
            "psnr": None if math.isinf(near) else near,
        }


def soon(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """The plan without dense steps at the start, so that two steps warm up what it runs."""
    if plan is None:
        return None
    return {**plan, "methods": [{**entry, **({"dense_steps": 0} if "dense_steps" in entry else {})}
                                for entry in plan["methods"]]}
