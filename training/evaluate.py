"""Generate held-out prompts through the genuine pipeline and let our classifier judge them."""

import argparse
import json
import platform
import time
import tomllib
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from torch import Tensor

from .captions import Scene, plain_caption
from .sampling import held_out_scenes, judge
from .sheets import grid, stack, strips
from .state import State


def generate(
    pipe: WanPipeline, scenes: list[Scene], frames: int, config: dict, deadline: float
) -> Tensor:
    """Frames [B, T, 3, E, E] in [-1, 1] by plain calls of the pipeline, until `deadline`."""
    settings = config["evaluation"]
    part = settings["clip_batch"] if frames > 1 else settings["picture_batch"]
    videos = []
    for begin in range(0, len(scenes), part):
        if begin and time.monotonic() >= deadline:
            break
        prompts = [plain_caption(s) for s in scenes[begin : begin + part]]
        device = pipe.transformer.device
        video = pipe(
            prompts,
            height=config["edge"],
            width=config["edge"],
            num_frames=frames,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=torch.Generator(device).manual_seed(begin),
            output_type="pt",
        ).frames
        videos.append(video.float().cpu() * 2 - 1)
    return torch.cat(videos)


def evaluate(
    folder: Path, classifier: torch.nn.Module, config: dict, device: torch.device, seconds: float
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Report and sheets; clips that do not fit into `seconds` are left out and not counted."""
    begin = time.monotonic()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = config["evaluation"]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "dtype": "float32",
        "prompts": "held-out object-background pairs",
        "seeds": "the index of the first prompt of each call",
        "steps": settings["steps"],
        "guidance": settings["guidance"],
    }
    sheets = []
    scenes = held_out_scenes(settings["pictures"], clip=False)
    video = generate(pipe, scenes, 1, config, begin + 0.35 * seconds)
    scenes = scenes[: len(video)]
    report["pictures"] = {"samples": len(video), **judge(classifier, video, scenes)}
    labels = [plain_caption(s) for s in scenes[:48]]
    sheets.append(grid(video[:48, 0], 8, 128, labels))
    if time.monotonic() - begin < 0.45 * seconds:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        some = generate(pipe, scenes[:64], 1, config, begin + 0.5 * seconds)
        figures = judge(classifier, some, scenes[: len(some)])
        report["pictures_euler"] = {"samples": len(some), **figures}
        pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(settings["clips"], clip=True)
    video = generate(pipe, scenes, config["clip_frames"], config, begin + seconds)
    scenes = scenes[: len(video)]
    report["clips"] = {"samples": len(video), **judge(classifier, video, scenes)}
    labels = [plain_caption(s) for s in scenes[:12]]
    sheets.append(strips(video[:12], 8, 128, labels))
    report["seconds"] = round(time.monotonic() - begin, 1)
    return report, sheets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--resume", type=Path, required=True, help="folder with restart.*.part")
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--clips", type=int)
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text())
    for name in ("pictures", "clips"):
        if getattr(arguments, name) is not None:
            config["evaluation"][name] = getattr(arguments, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = State(config, device)
    state.load_compact(arguments.resume)
    report, sheets = evaluate(
        arguments.model, state.classifier.eval(), config, device, arguments.seconds
    )
    report["classifier"] = state.record["figures"].get("classifier")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    stack(sheets, arguments.out / "sheet.png")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
