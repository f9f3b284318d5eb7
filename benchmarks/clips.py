"""Clips and pictures of a shipped model for measurements: prompts, latents, fast decoding."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import knobs  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.method import Method  # noqa: E402

PROMPTS = [
    "a red apple moving left on a blue background",
    "a sailboat moving right on a cyan background",
    "a rocket moving up on a black background",
    "a hamburger spinning on a green background",
    "a strawberry bouncing on a white background",
    "a balloon moving up on a yellow background",
    "a banana moving down on a purple background",
    "a carrot growing on a brown background",
    "a pineapple moving right on a striped pink background",
    "a mushroom not moving on a dotted green background",
    "a doughnut spinning on an orange background",
    "a slice of pizza moving left on a gray background",
    "a watermelon bouncing on a red background",
    "an eggplant growing on a gradient yellow background",
    "a bunch of grapes moving down on a white background",
    "a sun moving up on a blue background",
    "a butterfly moving left on a green background",
    "a snowman not moving on a purple background",
    "a penguin bouncing on a cyan background",
    "a turtle moving right on a brown background",
    "a star spinning on a dotted black background",
    "a gem growing on a pink background",
    "a house moving down on an orange background",
    "a crown bouncing on a striped red background",
    "a frog moving up on a white background",
    "an umbrella spinning on a yellow background",
    "a gift growing on a gradient blue background",
    "a pine tree moving left on a gray background",
    "a rainbow moving down on a black background",
    "a light bulb bouncing on a green background",
    "an airplane moving right on a white background",
    "a ladybug moving up on a pink background",
]


@contextmanager
def other_kernel(device: str) -> Iterator[None]:
    """Another dense kernel: the noise floor of every likeness."""
    # the text encoder's biased attention needs the second choice on a GPU
    gpu = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(gpu if device == "cuda" else [SDPBackend.MATH]):
        yield


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, T, H, W] of tiny-video to frames [B, T, 3, H, W] in [0, 1].

    By the streamlined decoder of `training/`, which tests hold equal to the stock one.
    """
    from training.autoencoder import FullSequence

    config = pipe.vae.config
    shape = (1, config.z_dim, 1, 1, 1)
    mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
    std = torch.tensor(config.latents_std, device=latents.device).view(shape)
    latents = (latents.float() * std + mean).to(pipe.vae.dtype).transpose(1, 2)
    clips = [FullSequence(pipe.vae).decode(clip) for clip in latents.split(8)]
    return (torch.cat(clips).float() / 2 + 0.5).clamp(0, 1)


@dataclass
class Maker:
    """Makes clips with one setting of everything but the method.

    call: arguments of the pipeline's call. shipped: whether the model is one of the package's,
    whose clips the streamlined decoder can decode.
    """

    pipe: Any
    call: dict[str, Any]
    device: str
    shipped: bool = True

    @property
    def _streamlined(self) -> bool:
        return self.shipped and type(self.pipe.vae).__name__ == "AutoencoderKLWan"

    def make(
        self, prompts: list[str], seeds: list[int], method: Method | None, **changes: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Frames [B, T, 3, H, W] in [0, 1], and seconds a clip with what the report says."""
        fastdiff.disable(self.pipe)
        if method is not None:
            fastdiff.enable(self.pipe, method, strict=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        kind = "latent" if self._streamlined else "pt"
        synchronize(self.device)
        begin = time.perf_counter()
        found = self.pipe(prompts, generator=generators, output_type=kind,
                          **{**self.call, **changes})
        synchronize(self.device)
        about: dict[str, Any] = {"seconds": (time.perf_counter() - begin) / len(prompts)}
        if method is not None:
            total = self.pipe.fastdiff.report.summary()
            about |= {"density": knobs.realised(total), "operations": total["density_all_calls"],
                      "sparse_calls": total["sparse_calls"]}
            about["fallbacks"] = sum(total["fallbacks"].values())
        fastdiff.disable(self.pipe)
        if self._streamlined:
            return decode(self.pipe, found.frames), about
        frames = found.frames if hasattr(found, "frames") else found.images
        return (frames if frames.dim() == 5 else frames[:, None]).float().clamp(0, 1), about
