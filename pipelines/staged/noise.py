"""How much noise a latent holds, whatever the scheduler writes it as, and the clean estimate.

Every scheduler here keeps a latent as `signal * clean + noise * unit_noise`. Flow matching writes
(1 - s, s), variance-preserving schedulers (cos, sin), Euler ones (1, s). The noise share
noise / (signal + noise) is the same number for the same picture in all three, and for flow matching
it is sigma itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# class names and what their latents look like
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "UniPCMultistepScheduler": "preserving",
    "DPMSolverMultistepScheduler": "preserving",
    "DEISMultistepScheduler": "preserving",
    "EulerDiscreteScheduler": "exploding",
    "EulerAncestralDiscreteScheduler": "exploding",
    "DDIMScheduler": "strided",
    "DDPMScheduler": "strided",
    "PNDMScheduler": "strided",
    "CogVideoXDDIMScheduler": "strided",
    "CogVideoXDPMScheduler": "strided",
}
# the others have the setting in their config and do not look at it
_CLIP = {"DDIMScheduler", "DDPMScheduler"}


class Level(NamedTuple):
    """Coefficients of the clean latent and of unit noise."""

    signal: float
    noise: float

    @property
    def share(self) -> float:
        return self.noise / (self.signal + self.noise)


def kind_of(scheduler: Any) -> str:
    """"flow", "preserving", "exploding" or "strided"; a ValueError says why it is none."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    name = next((n for n in names if n in SCHEDULERS), None)
    if name is None:
        raise ValueError(f"{names[0]} cannot run in stages: accepted are {', '.join(SCHEDULERS)}")
    config = scheduler.config
    kind = SCHEDULERS[name]
    for setting, good in (("use_beta_sigmas", False), ("use_lu_lambdas", False),
                          ("invert_sigmas", False), ("solver_p", None),
                          ("timestep_type", "discrete"), ("thresholding", False)):
        if config.get(setting) not in (None, good):
            raise ValueError(f"{name} with {setting}={config[setting]!r} cannot run in stages: "
                             f"set {setting}={good!r}")
    if name == "PNDMScheduler" and not config.skip_prk_steps:
        raise ValueError("PNDMScheduler with skip_prk_steps=False cannot run in stages: "
                         "set skip_prk_steps=True")
    if kind == "preserving" and config.get("use_flow_sigmas"):
        kind = "flow"
    curved = [f"use_{curve}_sigmas" for curve in ("karras", "exponential")]
    if kind == "flow" and any(config.get(setting) for setting in curved):
        raise ValueError(f"{name} with a {' or '.join(curved)} curve and flow matching cannot run "
                         "in stages: switch the curve off")
    return kind


def most_noise(scheduler: Any, kind: str) -> float:
    """The largest noise share at which this scheduler can evaluate the model."""
    if kind == "flow":
        return 1.0
    ratio = float(table_ratios(scheduler)[-1])
    return ratio / (1 + ratio)


def level_at(scheduler: Any, kind: str, index: int) -> Level:
    """The level at which step `index` of this scheduler's own schedule starts."""
    if kind == "strided":
        kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
        return Level(kept**0.5, (1 - kept) ** 0.5)
    return level_of(kind, float(scheduler.sigmas[index]))


def level_of(kind: str, sigma: float) -> Level:
    """The level of a value of `scheduler.sigmas`."""
    if kind == "flow":
        return Level(1 - sigma, sigma)
    if kind == "exploding":
        return Level(1.0, sigma)
    norm = (1 + sigma**2) ** 0.5
    return Level(1 / norm, sigma / norm)


def ratio_of(share: float) -> float:
    """Noise to signal of a noise share; pure noise is infinite."""
    return share / (1 - share) if share < 1 else float("inf")


def table_ratios(scheduler: Any) -> Tensor:
    """Noise to signal at every training timestep of a variance-preserving scheduler, float64."""
    kept = scheduler.alphas_cumprod.double().cpu()
    return ((1 - kept) / kept.clamp_min(1e-12)).sqrt()


def timestep_of(table: Tensor, ratio: Tensor) -> Tensor:
    """Where in the table a ratio lies, as a fraction of timesteps; clipped to the table."""
    logs = table.clamp_min(1e-12).log()
    wanted = ratio.clamp_min(1e-12).log().clamp(logs[0], logs[-1])
    right = torch.searchsorted(logs, wanted).clamp(1, len(logs) - 1)
    low, high = logs[right - 1], logs[right]
    return right - 1 + (wanted - low) / (high - low).clamp_min(1e-12)


def ratio_at(table: Tensor, timestep: Tensor) -> Tensor:
    """The inverse of `timestep_of`."""
    logs = table.clamp_min(1e-12).log()
    below = timestep.floor().clamp(0, len(logs) - 2).long()
    return (logs[below] + (timestep - below) * (logs[below + 1] - logs[below])).exp()


def clean_estimate(scheduler: Any, level: Level, output: Tensor, sample: Tensor) -> Tensor:
    """The clean latent that the model's output speaks of, float32.

    output: what the denoiser predicts for `sample`, as the scheduler's prediction_type says.
    """
    signal, noise = level
    z, out = sample.float(), output.float()
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction == "epsilon":
        clean = (z - noise * out) / signal
    elif prediction == "v_prediction":
        norm = (signal**2 + noise**2) ** 0.5
        clean = (signal * z / norm - noise * out) / norm
    elif prediction == "sample":
        clean = out
    elif prediction == "flow_prediction":
        clean = z - noise * out
    else:
        raise ValueError(f"prediction_type={prediction!r} cannot run in stages: accepted is "
                         "epsilon, v_prediction, sample or flow_prediction")
    if scheduler.config.get("clip_sample") and type(scheduler).__name__ in _CLIP:
        limit = scheduler.config.get("clip_sample_range", 1.0)
        clean = clean.clamp(-limit, limit)
    return clean
