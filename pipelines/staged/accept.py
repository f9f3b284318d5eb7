"""What can run in stages: pipelines, their schedulers, weights and sizes; reasons where not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff.method import Host
from fastdiff.pipelines.families.base import Condition, Size, Staging
from fastdiff.pipelines.staged.noise import kind_of, most_noise, ratio_of
from fastdiff.pipelines.staged.stages import Preset, stage_end

# arguments of a call that bring a schedule of their own
_OWN_SCHEDULES = ("timesteps", "sigmas", "denoising_end")
# of a scheduler's most noise: where a preset's stage starts that asks for more
_BELOW = 0.99


def staging_of(host: Host) -> Staging:
    """The family's data for this pipeline; a ValueError says why there is none."""
    pipe = host.pipe
    if pipe is None or not hasattr(pipe, "prepare_latents"):
        what = "a bare model" if pipe is None else type(pipe).__name__
        raise ValueError(f"bottleneck works inside the call of a diffusers pipeline, not of {what}")
    part = next(iter(host.models.values()))
    staging = part.family.staging
    if staging is None:
        raise ValueError(f"bottleneck does not know how {type(part.model).__name__} "
                         f"({part.family.name}) changes size")
    if condition_of(staging, pipe) is None and not _names(pipe) & {*staging.pipelines}:
        accepted = ", ".join([*staging.pipelines, *staging.conditions])
        raise ValueError(f"bottleneck cannot run in {type(pipe).__name__}: {staging.others}. "
                         f"Accepted of this family: {accepted}")
    return staging


def _names(pipe: Any) -> set[str]:
    return {cls.__name__ for cls in type(pipe).__mro__}


def condition_of(staging: Staging, pipe: Any) -> Condition | None:
    names = _names(pipe)
    return next((made for name, made in staging.conditions.items() if name in names), None)


def fitted(preset: Preset, scheduler: Any) -> Preset:
    """A preset for this scheduler: its shifts are those of flow matching, as its levels are."""
    kind = kind_of(scheduler)
    if kind == "flow":
        return preset
    top = most_noise(scheduler, kind)
    starts = [s.sigma_start if s.sigma_start == 1 or s.sigma_start < top else _BELOW * top
              for s in preset.stages]
    return replace(preset, stages=tuple(
        replace(s, sigma_start=start, shift=None)
        for s, start in zip(preset.stages, starts, strict=True)))


def check_scheduler(scheduler: Any, chosen: Preset) -> None:
    kind = kind_of(scheduler)
    if kind == "strided" and chosen.transition == "matched-noise":
        raise ValueError(f"matched-noise needs exact noise levels, and {type(scheduler).__name__} "
                         "steps by a fixed stride: use restart or continue, or a scheduler with "
                         "sigmas such as DPMSolverMultistepScheduler")
    _check_reach(scheduler, most_noise(scheduler, kind), chosen)


def _check_reach(scheduler: Any, top: float, chosen: Preset) -> None:
    """Refuse a stage that would end at more noise than the scheduler has to begin with."""
    for stage, following in zip(chosen.stages, chosen.stages[1:], strict=False):
        if stage_end(stage, following, chosen.transition) < top:
            continue
        smaller = following.scale / stage.scale if chosen.transition == "matched-noise" else 1.0
        most = ratio_of(top) * smaller
        raise ValueError(
            f"sigma_start={following.sigma_start:g} is not possible with {chosen.transition} and "
            f"this {type(scheduler).__name__}, whose noise share goes up to {top:.3f}: accepted is "
            f"less than {most / (1 + most):.3f}")


def check_no_schedule(asked: dict[str, Any], other: str) -> None:
    """Refuse arguments of a call that bring a schedule. other: what brings one too, "does X"."""
    given = [name for name in _OWN_SCHEDULES if asked.get(name) is not None]
    if given:
        raise ValueError(f"{given[0]}= brings a schedule of its own, and so {other}: leave "
                         f"{given[0]} out, or disable_fastdiff()")


def check_caches(models: Mapping[str, Any]) -> None:
    """Refuse a cache that cannot begin anew in the middle of a call."""
    for name, model in models.items():
        kind = type(getattr(model, "_cache_config", None)).__name__
        if kind == "FasterCacheConfig":
            raise ValueError(
                f"FasterCache is enabled on {name}: it skips attention from what earlier steps "
                "left, and those of another stage have another size. disable_cache() first, or "
                "use a cache that begins anew, such as FirstBlockCache")


def check_changeable(host: Host, staging: Staging, chosen: Preset) -> None:
    part = next(iter(host.models.values()))
    reason = staging.fixed(part.model)
    if reason is not None and any(stage.scale != 1 for stage in chosen.stages):
        raise ValueError(f"{type(part.model).__name__} cannot run at another size: {reason}. Use "
                         "fewer steps, or other weights")


def check_whole(sizes: list[Size]) -> None:
    for before, after in zip(sizes, sizes[1:], strict=False):
        small, large = sorted((before, after), key=lambda size: size.rows)
        factors = (large.rows / small.rows, large.columns / small.columns)
        if factors[0] != factors[1] or factors[0] % 1:
            raise ValueError(
                f"matched-noise needs sides that are whole multiples, got {before.height}x"
                f"{before.width} and {after.height}x{after.width} after rounding: use a size that "
                "the scale divides, or transition=restart")
