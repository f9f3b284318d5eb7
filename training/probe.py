"""Whether a part of `tiny-image` may be compiled: a few of its steps in a process of their own.

A kernel that reads out of bounds takes the whole process with it, so the training does not find
this out by itself. The compiled code stays in the compiler's cache on disk, where the training
finds it.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn

from .image_models import CHANNELS, build_codec, build_joint
from .joint import LeanJoint, compile_layers, joint_loss
from .lean_codec import LeanCodec, codec_loss
from .progress import Compiler, Log, autocast, fast_arithmetic, synchronise
from .text import TOKENS

PARTS = ("codec", "small", "full")


class Probes:
    """One probe process a part, begun at once; `allows` waits for a verdict and logs it."""

    def __init__(self, config: Path, log: Log, active: bool):
        self.log = log
        command = [sys.executable, "-m", "training.probe", "--config", str(config), "--part"]
        self.running = {
            part: subprocess.Popen([*command, part], stdout=subprocess.PIPE, text=True)
            for part in PARTS
            if active
        }

    def settled(self, part: str) -> bool:
        """Whether `allows` would answer at once."""
        return part not in self.running or self.running[part].poll() is not None

    def allows(self, part: str, seconds: float) -> bool:
        """Whether `part` ran compiled and agreed with its plain form, known within `seconds`."""
        process = self.running.pop(part, None)
        if process is None:
            return False
        begin, said = time.monotonic(), ""
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        found: dict[str, Any] = {"code": process.returncode}
        with contextlib.suppress(ValueError):
            found |= json.loads(said.strip().splitlines()[-1] if said.strip() else "{}")
        found["waited"] = time.monotonic() - begin
        self.log.write("probe", part=part, **found)
        return process.returncode == 0 and bool(found.get("agree"))

    def close(self) -> None:
        for process in self.running.values():
            process.kill()


def _gradients(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.stack(norms)


def _compare(model: nn.Module, plain: Any, compiled: Any, device: torch.device) -> dict[str, Any]:
    """Losses, gradient norms and milliseconds a step of both forms, from the same seed."""
    values, seconds = [], []
    for form in (plain, compiled):
        for repeat in range(8):
            if repeat in (0, 3):
                synchronise(device)
                begin = time.monotonic()
            torch.manual_seed(repeat)
            with autocast(device):
                loss = form()
                norms = _gradients(model, loss)
            if repeat == 0:
                values.append((float(loss.detach()), norms))
        synchronise(device)
        seconds.append((time.monotonic() - begin) / 5)
    (loss, norms), (other, others) = values
    spread = float((norms - others).norm() / norms.norm())
    agree = abs(loss - other) < 0.02 * abs(loss) and spread < 0.05
    return {
        "agree": agree,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "loss": [round(loss, 5), round(other, 5)],
        "gradient_spread": round(spread, 5),
        "milliseconds": [round(1000 * s, 2) for s in seconds],
    }


def probe_codec(config: dict, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    vae, settings = build_codec(config["codec"]).to(device), config["codec"]
    plain, compiled = LeanCodec(vae), LeanCodec(vae, Compiler(True))
    shape = (settings["batch"], 3, settings["crop"], settings["crop"])
    frames = torch.rand(shape, device=device) * 2 - 1
    found = _compare(
        vae,
        lambda: codec_loss(plain, frames, settings["kl"])[0],
        lambda: codec_loss(compiled, frames, settings["kl"])[0],
        device,
    )
    # the banks encode other shapes
    for name in ("small", "full"):
        edge, n = config[name]["edge"], config[name]["encode_batch"]
        frames = torch.rand(n, 3, edge, edge, device=device) * 2 - 1
        with autocast(device), torch.no_grad():
            want = plain.encode(frames).float()
            error = float((compiled.encode(frames).float() - want).norm() / want.norm())
        found[f"encode_{edge}"] = round(error, 5)
        found["agree"] = found["agree"] and error < 0.03
    return found


def probe_joint(config: dict, part: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    settings, text = config[part], config["text"]
    model = build_joint(config["denoiser"], text).to(device).float()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    joint, n, cells = LeanJoint(model), settings["batch"], settings["edge"] // 8
    latents = torch.randn(n, CHANNELS, cells, cells, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(n, TOKENS, text["dim"], device=device)
    pooled = torch.randn(n, text["pooled_dim"], device=device)
    compile_layers(model)

    def step(stance: str) -> Tensor:
        with torch.compiler.set_stance(stance):
            return joint_loss(joint, latents, hidden, pooled, settings["shift"], settings["tail"])

    return _compare(model, lambda: step("force_eager"), lambda: step("default"), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, required=True)
    args = parser.parse_args()
    config = tomllib.loads(args.config.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_arithmetic(device)
    Compiler(True)
    if args.part == "codec":
        found = probe_codec(config, device)
    else:
        found = probe_joint(config, args.part, device)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
