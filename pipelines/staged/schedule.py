"""The noise schedule of one stage, written into a copy of the user's scheduler."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.pipelines.staged.noise import (
    Level,
    kind_of,
    level_at,
    ratio_at,
    ratio_of,
    table_ratios,
    timestep_of,
)
from fastdiff.scheduler import disarm_scheduler

# a multistep solver takes the logarithm of the signal
_NEARLY_ONE = 1 - 1e-6
_KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Span:
    """What a stage asks of its schedule.

    steps: evaluations. start: noise share of the first one. end: noise share that the last one
    steps to, 0 for clean. shift: factor on noise to signal, None for the scheduler's own. native:
    the scheduler's own schedule from pure noise to clean.
    """

    steps: int
    start: float
    end: float = 0.0
    shift: float | None = None

    @property
    def native(self) -> bool:
        return self.start == 1 and self.end == 0 and self.shift is None


def own_copy(scheduler: Any) -> Any:
    """A stock copy of the user's scheduler: what happens to it never reaches theirs."""
    twin = copy.deepcopy(scheduler)
    disarm_scheduler(twin)
    return twin


def write(scheduler: Any, span: Span, arguments: dict[str, Any], tokens: int | None) -> None:
    """Set the schedule of `scheduler`, a copy.

    arguments: of the pipeline's own set_timesteps call, by name. tokens: latent tokens of this
    stage, for schedulers that shift by them.
    """
    kind = kind_of(scheduler)
    if kind == "strided":
        _write_strided(scheduler, span, arguments.get("device"))
        return
    mu = _mu(scheduler, arguments, tokens)
    own = dict(arguments)
    # a schedule of one step cannot be stretched to a terminal level; it is replaced below
    terminal = scheduler.config.get("shift_terminal")
    native = span.native and not (terminal and span.steps == 1)
    steps = span.steps if native else max(span.steps, 2)
    if own.get("num_inference_steps") is not None:
        own["num_inference_steps"] = steps
    if own.get("sigmas") is not None:
        own["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    if mu is not None:
        own["mu"] = mu
    scheduler.set_timesteps(**own)
    if native:
        return
    if kind == "flow":
        shift = _flow_shift(scheduler, mu) if span.shift is None else span.shift
        levels = flow_levels(span, shift)
        if terminal and span.shift is None and span.end == 0:
            levels = _stretch(levels, terminal)
        if hasattr(scheduler, "model_outputs"):
            levels = levels.clamp_max(_NEARLY_ONE)
        timesteps = levels * scheduler.config.num_train_timesteps
        end = span.end or _clean(scheduler)
    else:
        levels, timesteps, end = _preserving_levels(scheduler, span)
    _store(scheduler, levels, timesteps, end)


def _clean(scheduler: Any) -> float:
    """The sigma of flow matching at which a schedule ends: DEIS takes its logarithm."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    total = scheduler.config.num_train_timesteps
    return 1 / total if "DEISMultistepScheduler" in names else 0.0


def flow_levels(span: Span, shift: float) -> Tensor:
    """sigma_j = shift u_j / (1 + (shift - 1) u_j) over even u from start to end, float64 [steps].

    The end itself is not among them: the last step goes there.
    """
    begin, end = (s / (s + shift * (1 - s)) for s in (span.start, span.end))
    u = begin + (end - begin) * torch.arange(span.steps, dtype=torch.float64) / span.steps
    levels = shift * u / (1 + (shift - 1) * u)
    levels[0] = span.start
    return levels


def _stretch(levels: Tensor, terminal: float) -> Tensor:
    """Let the last evaluation be at `terminal`, the first stay: what shift_terminal asks for."""
    if len(levels) < 2 or levels[-1] >= levels[0]:
        return levels
    return levels[0] - (levels[0] - levels) * (levels[0] - terminal) / (levels[0] - levels[-1])


def _store(scheduler: Any, levels: Tensor, timesteps: Tensor, end: float) -> None:
    sigmas, old = scheduler.sigmas, scheduler.timesteps
    values = torch.cat([levels, torch.tensor([end], dtype=levels.dtype)])
    scheduler.sigmas = values.to(sigmas.dtype).to(sigmas.device)
    if not old.dtype.is_floating_point:
        timesteps = timesteps.round()
    scheduler.timesteps = timesteps.to(old.dtype).to(old.device)
    scheduler.num_inference_steps = len(levels)
    scheduler.set_begin_index(0)


def _preserving_levels(scheduler: Any, span: Span) -> tuple[Tensor, Tensor, float]:
    """(noise to signal, timesteps, noise to signal at the end) over the scheduler's own curve."""
    table = table_ratios(scheduler)
    shift = span.shift or 1.0
    bounds = torch.tensor([ratio_of(span.start), ratio_of(span.end)], dtype=torch.float64) / shift
    config = scheduler.config
    at = torch.arange(span.steps, dtype=torch.float64)
    if config.get("use_karras_sigmas") or config.get("use_exponential_sigmas"):
        # these curves end on their smallest level; an end that is given is not among the levels
        high, low = (float(b) for b in bounds.clamp(float(table[0]), float(table[-1])))
        at = at / (span.steps if span.end else max(span.steps - 1, 1))
        if config.get("use_karras_sigmas"):
            root = 1 / _KARRAS_RHO
            own = (high**root + at * (low**root - high**root)) ** _KARRAS_RHO
        else:
            own = (math.log(high) + at * (math.log(low) - math.log(high))).exp()
    else:
        high, low = timestep_of(table, bounds)
        low = low if span.end else torch.zeros((), dtype=torch.float64) - 1
        own = ratio_at(table, (high + (low - high) * at / span.steps).clamp_min(0))
    ratios = own * shift
    # some solvers cannot step to zero: clean is where their own schedule ends
    end = ratio_of(span.end) if span.end else float(scheduler.sigmas[-1])
    return ratios, timestep_of(table, ratios), end


def _write_strided(scheduler: Any, span: Span, device: Any) -> None:
    """These schedulers step by a fixed stride, so many timesteps at once; the start is free."""
    if span.shift not in (None, 1):
        raise ValueError(f"shift={span.shift:g} is not possible with {type(scheduler).__name__}, "
                         "which steps by a fixed stride: leave shift out, or use a scheduler "
                         "with sigmas such as DPMSolverMultistepScheduler")
    total = scheduler.config.num_train_timesteps
    if span.native:
        scheduler.set_timesteps(span.steps, device=device)
        return
    table = table_ratios(scheduler)
    bounds = torch.tensor([ratio_of(span.start), ratio_of(span.end)], dtype=torch.float64)
    first, last = (round(float(t)) for t in timestep_of(table, bounds))
    # as many steps a run as give a stride that the schedule can have
    strides = {total // steps: steps for steps in range(total, 0, -1)}
    if span.end:
        stride = min(strides, key=lambda n: abs(n * span.steps - (first - last)))
    else:
        # the last step has to reach clean
        stride = min(n for n in strides if n * span.steps > first)
    first = min(max(first, stride * (span.steps - 1)), total - 1)
    scheduler.set_timesteps(strides[stride], device=device)
    times = first - stride * torch.arange(span.steps)
    if hasattr(scheduler, "plms_timesteps") and span.steps > 1:
        # its second evaluation is made at the second timestep twice
        times = torch.cat([times[:2], times[1:]])
    scheduler.timesteps = times.clamp_min(0).to(scheduler.timesteps)


def tokens_of(scheduler: Any, mu: float) -> float:
    """The tokens for which a pipeline computes this shift."""
    least, most, low, high = _mu_line(scheduler)
    return least + (mu - low) * (most - least) / (high - low)


def _mu(scheduler: Any, arguments: dict[str, Any], tokens: int | None) -> float | None:
    """The pipeline's resolution-dependent shift, for the tokens of this stage."""
    mu = arguments.get("mu")
    if mu is None or tokens is None:
        return mu
    least, most, low, high = _mu_line(scheduler)
    return low + (high - low) * (tokens - least) / (most - least)


def _mu_line(scheduler: Any) -> tuple[float, float, float, float]:
    """Tokens and shifts at the two ends of the line."""
    read = scheduler.config.get
    return (read("base_image_seq_len", 256), read("max_image_seq_len", 4096),
            read("base_shift", 0.5), read("max_shift", 1.15))


def _flow_shift(scheduler: Any, mu: float | None) -> float:
    config = scheduler.config
    if config.get("use_dynamic_shifting") and mu is not None:
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    shift = getattr(scheduler, "shift", None)
    return float(config.flow_shift if shift is None else shift)


def first_level(scheduler: Any) -> Level:
    return level_at(scheduler, kind_of(scheduler), 0)
