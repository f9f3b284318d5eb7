"""Samples of `tiny-image`: quick ones with the average weights, and the genuine pipeline."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor

from .captions import Scene, plain_caption
from .denoiser import sigma_schedule
from .image_models import CHANNELS, encode_prompts, unpack
from .image_state import ImageState, shift_of
from .joint import LeanJoint
from .progress import autocast
from .sampling import held_out_scenes, judge
from .text import tokenize

if TYPE_CHECKING:
    from .image_stages import ImageRun


def judge_pictures(state: ImageState, frames: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The judge's figures of frames [B, 3, E, E] in [-1, 1], which it sees at 256 pixels."""
    small = F.interpolate(frames.float(), size=(256, 256), mode="area")
    return judge(state.classifier, small[:, None], scenes)


@torch.no_grad()
def quick_samples(state: ImageState, scenes: list[Scene], edge: int, part: int = 60) -> Tensor:
    """Frames [B, 3, edge, edge] by Euler steps with guidance, from the average weights."""
    device, settings = state.device, state.config["evaluation"]
    joint, cells, out = LeanJoint(state.averaged()), edge // 8, []
    ids, _ = tokenize(state.tokenizer, [*map(plain_caption, scenes), ""], device)
    hidden, pooled = encode_prompts(state.text, state.clip, ids)
    generator = torch.Generator(device).manual_seed(0)
    sigmas = sigma_schedule(settings["steps"], shift_of((cells // 2) ** 2))
    fast = autocast(device)
    with fast, torch.compiler.set_stance("force_eager"):
        for begin in range(0, len(scenes), part):
            rows = torch.arange(begin, min(begin + part, len(scenes)), device=device)
            n = len(rows)
            both = torch.cat([rows, torch.full_like(rows, len(scenes))])
            shape = (n, (cells // 2) ** 2, 4 * CHANNELS)
            x = torch.randn(shape, generator=generator, device=device)
            for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
                sigma = torch.full((2 * n,), now, device=device)
                v = joint(torch.cat([x, x]), sigma, hidden[both], pooled[both], cells).float()
                said, empty = v.chunk(2)
                x = x + (after - now) * (empty + settings["guidance"] * (said - empty))
            z = unpack(x, cells)
            out.append(state.vae.decoder(state.vae.post_quant_conv(z)).float().clamp(-1, 1))
    return torch.cat(out)


def check(run: "ImageRun", edge: int) -> None:
    """Figures of a few quick samples at `edge` pixels."""
    state = run.state
    scenes = held_out_scenes(state.config["evaluation"]["check_pictures"], clip=False)
    begin = time.monotonic()
    figures = judge_pictures(state, quick_samples(state, scenes, edge), scenes)
    state.record["figures"][f"check_{edge}"] = {"samples": len(scenes), **figures}
    run.log.write("check", edge=edge, seconds=time.monotonic() - begin, **figures)


def call(
    pipe: FluxPipeline, scenes: list[Scene], edge: int, config: dict, seed: int, **more: Any
) -> Tensor:
    """One plain call of the pipeline: frames [B, 3, edge, edge] in [-1, 1]."""
    settings = config["evaluation"]
    arguments = {
        "height": edge,
        "width": edge,
        "num_inference_steps": settings["steps"],
        "true_cfg_scale": settings["guidance"],
        "negative_prompt": [""] * len(scenes),
        "max_sequence_length": 32,
    }
    generator = torch.Generator(pipe.transformer.device).manual_seed(seed)
    prompts = [plain_caption(s) for s in scenes]
    found = pipe(prompts, generator=generator, output_type="pt", **(arguments | more))
    return found.images.float() * 2 - 1


def evaluate_images(
    folder: Path, state: ImageState, seconds: float
) -> tuple[dict[str, Any], list[tuple[Tensor, list[str]]]]:
    """Figures by plain calls of the folder's pipeline at several sizes, and frames to show."""
    begin, config, device = time.monotonic(), state.config, state.device
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings, base = config["evaluation"], config["edge"]
    report: dict[str, Any] = {"steps": settings["steps"], "guidance": settings["guidance"]}
    shown = []
    plans = [
        ("pictures", settings["pictures"], base, settings["picture_batch"], {}),
        ("long_padding", settings["large"], base, settings["large"], {"max_sequence_length": 512}),
    ]
    plans += [
        (f"pictures_{edge}", settings["large"], edge, max(1, settings["large"] // 2), {})
        for edge in config["large"]["edges"]
    ]
    for name, n, edge, part, more in plans:
        scenes, frames = held_out_scenes(n, clip=False), []
        for i in range(0, n, part):
            if frames and time.monotonic() - begin > seconds:
                break
            frames.append(call(pipe, scenes[i : i + part], edge, config, i, **more).cpu())
        found = torch.cat(frames)
        scenes = scenes[: len(found)]
        with torch.no_grad():
            report[name] = {
                "samples": len(found),
                "edge": edge,
                **judge_pictures(state, found.to(device), scenes),
            }
        shown.append((found[:32 if edge == base else 8], [plain_caption(s) for s in scenes[:32]]))
        if time.monotonic() - begin > seconds:
            break
    report["seconds"] = round(time.monotonic() - begin, 1)
    return report, shown
