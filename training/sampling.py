"""Quick Euler samples with the lean denoiser and the average weights, for checks."""

import random

import torch
from torch import Tensor

from .autoencoder import FullSequence
from .captions import MOTIONS, Scene, held_out_pairs, plain_caption
from .classifier import direction, displacement
from .data import random_scene
from .denoiser import LeanDenoiser, pad_bias, sigma_schedule
from .progress import autocast
from .state import State
from .text import encode_captions, tokenize

PADDED = 512


def held_out_scenes(n: int, clip: bool, seed: int = 1234) -> list[Scene]:
    """Scenes over the held-out pairs in turn, with random patterns and motions."""
    rng = random.Random(seed)
    pairs = held_out_pairs()
    rng.shuffle(pairs)
    scenes = []
    for i in range(n):
        drawn = random_scene(rng, clip, place_share=1.0 if clip else 0.25)
        obj, colour = pairs[i % len(pairs)]
        motion = None if not clip else i % 8
        place = drawn.place if motion is None or motion >= 5 else None
        scenes.append(Scene(obj, colour, drawn.pattern, motion, place))
    return scenes


@torch.no_grad()
def sample(
    state: State, scenes: list[Scene], frames: int, steps: int, guidance: float, part: int
) -> Tensor:
    """Frames [B, T, 3, E, E] in [-1, 1] for the canonical captions of `scenes`."""
    device = state.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    denoiser, model = LeanDenoiser(state.averaged()), FullSequence(state.vae)
    ids, mask = tokenize(state.tokenizer, [*map(plain_caption, scenes), ""], device)
    text, lengths = encode_captions(state.text, ids, mask)
    mean, std = state.latent_statistics()
    generator = torch.Generator(device).manual_seed(0)
    edge, out = state.config["edge"] // 8, []
    for begin in range(0, len(scenes), part):
        rows = torch.arange(begin, min(begin + part, len(scenes)), device=device)
        n = len(rows)
        both = torch.cat([text[rows], text[-1:].expand(n, -1, -1)])
        length = torch.cat([lengths[rows], lengths[-1:].expand(n)])
        bias = pad_bias(length, torch.full_like(length, PADDED))
        shape = (n, 16, (frames + 3) // 4, edge, edge)
        x = torch.randn(shape, generator=generator, device=device)
        sigmas = sigma_schedule(steps, 3.0)
        for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            sigma = torch.full((2 * n,), now, device=device)
            v = denoiser(torch.cat([x, x]), sigma, both, bias, dtype).float()
            cond, uncond = _unpatch(v, shape).chunk(2)
            x = x + (after - now) * (uncond + guidance * (cond - uncond))
        z = (x * std + mean).transpose(1, 2)
        with autocast(device):
            out.append(model.decode(z).float().clamp(-1, 1))
    return torch.cat(out)


def _unpatch(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    _, c, t, h, w = shape
    v = v.view(-1, t, h // 2, w // 2, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5)
    return v.reshape(-1, c, t, h, w)


@torch.no_grad()
def judge(classifier: torch.nn.Module, video: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """What the classifier says about frames [B, T, 3, E, E] against what was asked for."""
    b, t = video.shape[:2]
    device = next(classifier.parameters()).device
    parts = [classifier(p.to(device)) for p in video.flatten(0, 1).split(256)]
    out = {k: torch.cat([p[k] for p in parts]).unflatten(0, (b, t)).cpu() for k in parts[0]}
    obj = torch.tensor([s.obj for s in scenes])
    colour = torch.tensor([s.colour for s in scenes])
    pattern = torch.tensor([s.pattern for s in scenes])
    top = out["object"].softmax(-1).mean(1).topk(5, -1).indices
    figures = {
        "object_top1": (top[:, 0] == obj).float().mean().item(),
        "object_top5": (top == obj[:, None]).any(1).float().mean().item(),
        "colour": (out["colour"].mean(1).argmax(-1) == colour).float().mean().item(),
        "pattern": (out["pattern"].mean(1).argmax(-1) == pattern).float().mean().item(),
    }
    if t > 1:
        figures["object_every_frame"] = (
            (out["object"].argmax(-1) == obj[:, None]).float().mean().item()
        )
        figures |= _judge_motion(out["centre"], scenes)
    placed = [i for i, s in enumerate(scenes) if s.place is not None]
    if placed:
        centres = out["centre"].mean(1)
        figures["placed"] = len(placed)
        figures["place"] = sum(in_place(centres[i], scenes[i].place) for i in placed) / len(placed)
    return figures


def in_place(centre: Tensor, place: tuple[int, int]) -> bool:
    column, row = (0 if v < 0.44 else 2 if v > 0.56 else 1 for v in centre.tolist())
    return (column, row) == place


def _judge_motion(centres: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of asked directions taken, by direction, of still objects and of bounces."""
    said = direction(displacement(centres))
    asked = [MOTIONS[s.motion] for s in scenes]
    figures: dict[str, float] = {}
    rows = [i for i, a in enumerate(asked) if a in MOTIONS[:4]]
    if rows:
        figures["direction"] = sum(said[i] == asked[i] for i in rows) / len(rows)
    for motion in (*MOTIONS[:4], "not moving", "spinning", "growing"):
        rows = [i for i, a in enumerate(asked) if a == motion]
        wanted = motion if motion.startswith("moving") else "not moving"
        if rows:
            name = motion.replace(" ", "_")
            figures[name] = sum(said[i] == wanted for i in rows) / len(rows)
    rows = [i for i, a in enumerate(asked) if a == "bouncing"]
    if rows:
        span = centres[rows].amax(1) - centres[rows].amin(1)
        figures["bouncing"] = ((span[:, 1] > 0.15) & (span[:, 0] < 0.1)).float().mean().item()
    return figures
