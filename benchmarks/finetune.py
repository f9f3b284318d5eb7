"""Fine-tune the shipped video model sparse: the loss of unseen clips before and after.

python benchmarks/finetune.py --tiny     # a minute or two of one CPU core
python benchmarks/finetune.py            # a GPU
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.models import load  # noqa: E402
from training.autoencoder import FullSequence  # noqa: E402
from training.captions import plain_caption  # noqa: E402
from training.data import load_sprites, make_batch, random_scene, render  # noqa: E402


class Clips(NamedTuple):
    """Latents [N, 16, T, H, W] and text [N, tokens, D] of rendered clips."""

    latents: Tensor
    text: Tensor


@torch.no_grad()
def draw(pipe: Any, count: int, frames: int, seed: int) -> Clips:
    """Random training scenes, rendered and encoded as the model was taught."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    device, dtype = pipe.transformer.device, pipe.vae.dtype
    config = pipe.vae.config
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1, 1)
                 for x in (config.latents_mean, config.latents_std))
    sprites, encoder = load_sprites(device), FullSequence(pipe.vae)
    latents, text = [], []
    for _ in range(count):
        scene = random_scene(rng, clip=True)
        video = render(make_batch([scene], rng, frames), sprites, 256).to(dtype)
        moments = encoder.encode(video)[:, :, :16].float().transpose(1, 2)
        latents.append((moments - mean) / std)
        text.append(pipe.encode_prompt(plain_caption(scene), do_classifier_free_guidance=False,
                                       max_sequence_length=64, device=device)[0])
    return Clips(torch.cat(latents), torch.cat(text).float())


def flow_loss(model: Any, clips: Clips, at: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity, noise - clip, at x = (1 - sigma) clip + sigma noise."""
    x, s = clips.latents[at], sigma.view(-1, 1, 1, 1, 1)
    kind = x.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        found = model(hidden_states=(1 - s) * x + s * noise, timestep=sigma * 1000,
                      encoder_hidden_states=clips.text[at], return_dict=False)[0]
    return F.mse_loss(found.float(), noise - x)


def draw_noise(clips: Clips, at: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Levels [n], logit-normal and shifted by 3 towards noise as in training, and the noise."""
    s = torch.sigmoid(torch.randn(len(at), generator=generator))
    noise = torch.randn(clips.latents[at].shape, generator=generator)
    device = clips.latents.device
    return (3 * s / (1 + 2 * s)).to(device), noise.to(device)


@torch.no_grad()
def losses(model: Any, clips: Clips, rounds: int, batch: int) -> list[float]:
    """The loss of every clip at the same levels and noise each time."""
    generator = torch.Generator().manual_seed(123)
    found = []
    for _ in range(rounds):
        for at in torch.arange(len(clips.latents)).split(batch):
            sigma, noise = draw_noise(clips, at, generator)
            for i in range(len(at)):
                one = slice(i, i + 1)
                found.append(flow_loss(model, clips, at[one], sigma[one], noise[one]).item())
    return found


def set_sparse(model: Any, args: argparse.Namespace, on: bool) -> Any:
    fastdiff.disable(model)
    if on:
        return fastdiff.enable(model, args.method, density=args.density, tail=args.tail,
                               min_tokens=1, max_density=1.0, strict=True)
    return None


def train(model: Any, clips: Clips, args: argparse.Namespace, sparse: bool) -> dict[str, Any]:
    """Some steps of AdamW, sparse or dense, on the same clips, levels and noise."""
    handle = set_sparse(model, args, sparse)
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), args.rate, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    generator = torch.Generator().manual_seed(7)
    seconds, found = [], []
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 5) * (1 - step / args.steps)
        at = torch.randint(len(clips.latents), (args.batch,), generator=generator)
        sigma, noise = draw_noise(clips, at, generator)
        begin = time.perf_counter()
        loss = flow_loss(model, clips, at, sigma, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        found.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        print(f"\r{'sparse' if sparse else 'dense'} step {step + 1} of {args.steps}: loss "
              f"{sum(found[-10:]) / len(found[-10:]):.4f}, {seconds[-1]:.2f} s", end="", flush=True)
    print()
    model.eval().requires_grad_(False)
    row: dict[str, Any] = {"losses": [round(x, 5) for x in found], "step": record.spread(seconds)}
    if handle is not None:
        total = handle.report.summary()
        row |= {"density": total["density"], "sparse_calls": total["sparse_calls"],
                "fallbacks": total["fallbacks"]}
    return row


def mean_ci(found: list[float]) -> dict[str, float]:
    x = torch.tensor(found, dtype=torch.float64)
    return {"mean": float(x.mean()), "ci95": float(1.96 * x.std() / len(found) ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="short clips, few steps, sparse only")
    parser.add_argument("--method", default="tile-sparse")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--tail", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=256, help="clips to train on")
    parser.add_argument("--unseen", type=int, default=32, help="clips to judge by")
    parser.add_argument("--rounds", type=int, default=4, help="levels and noises for each of them")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--no-control", action="store_true", help="skip the dense run")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.frames, args.steps, args.batch, args.clips = 17, 16, 1, 8
        args.unseen, args.rounds, args.no_control = 4, 2, True
    pipe = load("tiny-video", device=args.device, dtype=torch.float32)
    model = pipe.transformer
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    begin = time.perf_counter()
    seen, unseen = (draw(pipe, n, args.frames, seed) for n, seed in ((args.clips, 1),
                                                                     (args.unseen, 2)))
    print(f"{args.clips} + {args.unseen} clips in {time.perf_counter() - begin:.0f} s", flush=True)

    rows: list[dict[str, Any]] = []
    base: dict[bool, list[float]] = {}

    def judge(trained: str) -> None:
        for sparse in (False, True):
            set_sparse(model, args, sparse)
            found = losses(model, unseen, args.rounds, args.batch)
            base.setdefault(sparse, found)
            change = [b - a for a, b in zip(base[sparse], found, strict=True)]
            row = {"trained": trained, "judged": "sparse" if sparse else "dense",
                   "loss": mean_ci(found), "change": mean_ci(change)}
            print(f"trained {trained:<7} judged {row['judged']:<7} loss {row['loss']['mean']:.4f} "
                  f"change {row['change']['mean']:+.4f} +- {row['change']['ci95']:.4f}", flush=True)
            rows.append(row)

    judge("not")
    for sparse in (True,) if args.no_control else (True, False):
        model.load_state_dict(weights)
        run = train(model, seen, args, sparse)
        judge("sparse" if sparse else "dense")
        rows[-1]["run"] = run
    fastdiff.disable(model)
    path = args.output or record.RESULTS / f"finetune_{args.device}{'_tiny' * args.tiny}.json"
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "device")}
    record.write(path, "finetune", args.device, settings, rows)
    print(f"{path}, {time.perf_counter() - begin:.0f} s in all")
    lowered = next(r for r in rows if r["trained"] == r["judged"] == "sparse")["change"]["mean"]
    sys.exit(lowered >= 0)


if __name__ == "__main__":
    main()
