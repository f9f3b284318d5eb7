"""Distil linear self-attention from `tiny-unet` into the published LinFusion format.

python -m training.linfusion --config training/tiny_unet.toml --model tiny-unet --out linear

The UNet is frozen; copies of its self-attention projections and the added ones are trained on
three losses, as in LinFusion (arXiv 2409.02097): the velocity, the frozen UNet's output, and the
outputs of its self-attention layers.
"""

import argparse
import copy
import json
import time
import tomllib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import load
from fastdiff.tokens.linfusion import LINEAR, LinFusionProcessor
from fastdiff.tokens.linfusion_format import LinearLayer, Place, begin, write

from .descent import Descent
from .progress import Log, autocast, fast_arithmetic, timed_loop
from .unet_models import UNetState, noised
from .unet_run import UNetRun


def student_of(teacher: nn.Module, layers: dict[Place, LinearLayer]) -> nn.Module:
    """A copy of the UNet whose self-attention is these layers."""
    student = copy.deepcopy(teacher)
    modules = dict(student.named_modules())
    for place, layer in layers.items():
        module = modules[place.module_name]
        object.__setattr__(module, LINEAR, layer)
        module.processor = LinFusionProcessor()
    return student


def watched(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Outputs of these modules in the running forward, by name."""
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: output}))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", default="tiny-unet", help="shipped name or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    args = parser.parse_args()
    config = tomllib.loads(args.config.read_text())
    settings, device = config["linear"], torch.device(
        "cuda" if torch.cuda.is_available() else "cpu")
    fast_arithmetic(device)
    pipe = load(args.model, "cpu", "float32")
    state = UNetState(config, device)
    state.text = state.clip = pipe.text_encoder.to(device).eval().requires_grad_(False)
    state.vae = pipe.vae.to(device).requires_grad_(False)
    state.tokenizer = pipe.tokenizer
    teacher = pipe.unet.to(device).eval().requires_grad_(False)
    layers = begin(teacher, settings["hidden"])
    names = [place.module_name for place in layers]
    student = student_of(teacher, layers)
    wanted_outputs, found_outputs = watched(teacher, names), watched(student, names)
    parameters = (p for layer in layers.values() for p in layer.parameters())
    descent = Descent(parameters, settings["lr"], (0.9, 0.999))
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "linfusion.jsonl", settings["seconds"] + 120)
    run = UNetRun(state, log, 900_000)
    bank = run.bank(config["full"])

    def step(progress: float) -> dict[str, Tensor]:
        if descent.steps % 4 == 3:
            bank.renew()
        latents, hidden, _ = bank.sample(settings["batch"])
        t = torch.randint(1000, (len(latents),), device=device)
        here, velocity = noised(state.alphas, latents.float(), t)
        with autocast(run.state.device):
            with torch.no_grad():
                stock = teacher(here, t, hidden, return_dict=False)[0]
            found = student(here, t, hidden, return_dict=False)[0]
        features = torch.stack([F.mse_loss(found_outputs[n].float(), wanted_outputs[n].float())
                                for n in names]).mean()
        output = F.mse_loss(found.float(), stock.float())
        loss = (F.mse_loss(found.float(), velocity) + settings["output"] * output
                + settings["features"] * features)
        descent.step(loss, progress)
        return {"loss": loss.detach(), "output": output.detach(), "features": features.detach()}

    began = time.monotonic()
    try:
        _, steps = timed_loop("linear", step, settings["seconds"], log, device)
    finally:
        run.source.close()
    write(args.out, {place: layer.to(torch.bfloat16) for place, layer in layers.items()})
    report = {"steps": steps, "seconds": round(time.monotonic() - began, 1)}
    (args.out / "linfusion.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
