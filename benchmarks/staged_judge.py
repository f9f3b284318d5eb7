"""Samples of a model that draws our own world, and what our own classifier says about them."""

import importlib
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from clips import decode as decode_wan  # noqa: E402
from clips import synchronize  # noqa: E402
from staged_rows import Row  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.models import find, load  # noqa: E402
from fastdiff.pipelines.bottleneck import BottleneckSampling  # noqa: E402
from training.captions import MOTIONS, Scene, plain_caption  # noqa: E402
from training.classifier import DIRECTIONS, direction, displacement  # noqa: E402
from training.data import load_sprites, make_batch, render  # noqa: E402
from training.sampling import held_out_scenes, in_place  # noqa: E402

ASKED = ("object", "colour", "pattern")
_LEAST = -10.0  # of a log probability, so that one sample cannot outweigh all others
Sample = dict[str, Any]


class Bench:
    """One model and kind: makes samples, judges them, counts their work.

    Sample i shows scene i modulo `prompts` with seed i, so every row has the same noise.
    """

    def __init__(
        self, model: str, kind: str, device: str, prompts: int, *, judge: str = "training.judge",
        steps: int | None = None, size: int | None = None, frames: int | None = None,
    ) -> None:
        self.device, self.clip = device, kind == "clip"
        known = find(model)
        best = known.defaults
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pipe = load(known, device=device, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps, self.size = steps or best.steps or 20, size or best.height or 256
        self.call: dict[str, Any] = {"height": self.size, "width": self.size, **best.arguments}
        if best.guidance is not None:
            self.call["guidance_scale"] = best.guidance
        if best.frames:
            self.call["num_frames"] = (frames or best.frames) if self.clip else 1
        elif self.clip:
            raise ValueError(f"{model} makes no clips: use --kind picture")
        self.judge = importlib.import_module(judge).load_judge(device)
        self.scenes = held_out_scenes(prompts, clip=self.clip)

    def scene(self, sample: int) -> Scene:
        return self.scenes[sample % len(self.scenes)]

    def latents(self, samples: range, row: Row, **changes: Any) -> Tensor:
        """Of one batched call: a prompt and a seed for each sample."""
        fastdiff.disable(self.pipe)
        if row.options is not None:
            # the shipped models say nothing of the sizes they were trained at
            fastdiff.enable(self.pipe, "bottleneck", force=True, **row.options)
        generators = [torch.Generator("cpu").manual_seed(i) for i in samples]
        prompts = [plain_caption(self.scene(i)) for i in samples]
        call = {**self.call, **changes}
        if "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
        return self.pipe(prompts, generator=generators, output_type="latent", return_dict=False,
                         num_inference_steps=row.steps or self.steps, **call)[0]

    @torch.no_grad()
    def frames(self, latents: Tensor, part: int = 32) -> Tensor:
        """[B, T, 3, E, E] in [0, 1], float32."""
        if type(self.pipe.vae).__name__ == "AutoencoderKLWan":
            return decode_wan(self.pipe, latents)
        if latents.ndim == 3:
            latents = self.pipe._unpack_latents(
                latents, self.size, self.size, self.pipe.vae_scale_factor)
        config = self.pipe.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pictures = [self.pipe.vae.decode(x.to(self.pipe.vae.dtype)).sample.float()
                    for x in latents.split(part)]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)[:, None]

    def samples(self, samples: range, row: Row) -> list[Sample]:
        """Make, decode and judge; one dict a sample. Seconds are those of the call alone."""
        synchronize(self.device)
        start = time.perf_counter()
        latents = self.latents(samples, row)
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / len(samples)
        seen = self.look(self.frames(latents))
        return [{"seconds": seconds, **self._told(seen, n, self.scene(i))}
                for n, i in enumerate(samples)]

    def renders(self, samples: range) -> list[Sample]:
        """The same captions, drawn by the training world: what a perfect model would make."""
        sprites = load_sprites(self.device, 160 if self.size <= 256 else 448)
        frames = self.call.get("num_frames", 1)
        found = []
        for i in samples:
            batch = make_batch([self.scene(i)], random.Random(i), frames)
            clip = render(batch, sprites, self.size).float() / 2 + 0.5
            found.append({"seconds": 0.0, **self._told(self.look(clip), 0, self.scene(i))})
        return found

    @torch.no_grad()
    def look(self, frames: Tensor) -> dict[str, Tensor]:
        """What the judge says, and its features, all [B, T, ...] on the CPU."""
        flat = frames.flatten(0, 1)
        sharp = _sharpness(flat).unflatten(0, frames.shape[:2])
        if flat.shape[-1] != 256:
            flat = F.interpolate(flat, (256, 256), mode="area")
        kept: list[Tensor] = []
        hook = self.judge.late.register_forward_hook(
            lambda module, args, out: kept.append(out.mean((2, 3))))
        parts = [self.judge(part * 2 - 1) for part in flat.to(self.device).split(256)]
        hook.remove()
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        found |= {"features": torch.cat(kept)}
        found = {key: x.float().cpu().unflatten(0, frames.shape[:2]) for key, x in found.items()}
        return {**found, "sharpness": sharp.cpu()}

    def _told(self, seen: dict[str, Tensor], n: int, scene: Scene) -> Sample:
        asked = {"object": scene.obj, "colour": scene.colour, "pattern": scene.pattern}
        chance = {what: seen[what][n].log_softmax(-1)[:, asked[what]].clamp_min(_LEAST)
                  for what in ASKED}
        row: Sample = {
            "object": int(seen["object"][n].softmax(-1).mean(0).argmax() == scene.obj),
            "colour": int(seen["colour"][n].mean(0).argmax() == scene.colour),
            "pattern": int(seen["pattern"][n].mean(0).argmax() == scene.pattern),
            "object_every_frame":
                float((seen["object"][n].argmax(-1) == scene.obj).float().mean()),
            "likelihood": float(sum(x.mean() for x in chance.values()) / len(chance)),
            "sharpness": float(seen["sharpness"][n].mean()),
            "features": [round(x, 4) for x in seen["features"][n].mean(0).tolist()],
        }
        if scene.place is not None:
            row["place"] = int(in_place(seen["centre"][n].mean(0), scene.place))
        if self.clip and scene.motion is not None and MOTIONS[scene.motion] in DIRECTIONS:
            moved = displacement(seen["centre"][n : n + 1])
            row["direction"] = int(direction(moved)[0] == MOTIONS[scene.motion])
        return row

    def costs(self, scales: set[float]) -> dict[float, float]:
        """Operations of one denoising step at each scale, over those of a full-size step."""
        found = {}
        for scale in {1.0, *scales}:
            cell = 16
            side = max(1, round(scale * self.size / cell)) * cell
            one, two = (self._operations(side, steps) for steps in (1, 2))
            found[scale] = two - one
        return {scale: value / found[1.0] for scale, value in found.items()}

    def _operations(self, side: int, steps: int) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.latents(range(1), Row("stock", steps=steps), height=side, width=side)
        return float(counter.get_total_flops())

    def work(self, row: Row, costs: dict[float, float]) -> float:
        """Of a row's denoising steps, over stock's."""
        if row.options is None:
            return (row.steps or self.steps) / self.steps
        stages = BottleneckSampling(force=True, **row.options).chosen.stages
        return sum(stage.count(self.steps) * costs[stage.scale] for stage in stages) / self.steps


def scales_of(rows: list[Row]) -> set[float]:
    """Every scale that these rows run at."""
    return {stage.scale for row in rows if row.options is not None
            for stage in BottleneckSampling(force=True, **row.options).chosen.stages}


def _sharpness(frames: Tensor) -> Tensor:
    """Mean absolute Laplacian of the grey picture, [N]."""
    grey = frames.mean(1, keepdim=True)
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(grey, kernel).abs().mean((1, 2, 3))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel, as in KID; features are scaled by those of b.

    Row i of both shows the same caption, so a sample never meets its own twin. Features that hardly
    vary in b, as many do in a small set, are scaled by a quarter of the mean deviation.
    """
    spread = b.std(0)
    scale = spread.clamp_min(0.25 * float(spread.mean()) + 1e-6)
    a, b = (a - b.mean(0)) / scale, (b - b.mean(0)) / scale
    d = a.shape[1]

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    def mean(values: Tensor) -> Tensor:
        n = len(values)
        return (values.sum() - values.diagonal().sum()) / (n * (n - 1))

    return float(mean(k(a, a)) + mean(k(b, b)) - 2 * mean(k(a, b)))
