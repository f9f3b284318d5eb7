"""The stages of `tiny-image`: text encoders, autoencoder, then the denoiser at growing sizes."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .captions import caption
from .data import Batch, load_sprites, random_scene, render
from .descent import Descent
from .image_bank import ImageBank
from .image_models import CHANNELS, encode_prompts, fold_statistics
from .image_sampling import check
from .image_state import ImageState
from .joint import LeanJoint, compile_layers, joint_loss
from .lean_codec import LeanCodec, codec_loss
from .probe import Probes
from .progress import Compiler, Log, autocast
from .scenes import SceneSource
from .stages import run_stage
from .text import TOKENS, TextHeads, caption_labels, text_loss, tokenize


@dataclass
class ImageRun:
    """What a stage needs besides the state; banks are made when first asked for."""

    state: ImageState
    log: Log
    compiler: Compiler
    source: SceneSource
    probes: Probes
    save: Callable[[], None] = lambda: None
    sprites: Tensor = field(init=False)
    banks: dict[int, ImageBank] = field(default_factory=dict)
    rare: bool = False

    def __post_init__(self) -> None:
        self.sprites = load_sprites(self.state.device, self.state.config["sprites"])
        self.joint = LeanJoint(self.state.denoiser)
        self.plain_codec = LeanCodec(self.state.vae)
        self.codec_compiler = Compiler(False)
        compile_layers(self.state.denoiser)

    @cached_property
    def codec(self) -> LeanCodec:
        """The autoencoder, compiled if its probe went well."""
        self.codec_compiler.active = self.probes.allows("codec", 45)
        return LeanCodec(self.state.vae, self.codec_compiler)

    @property
    def stance(self) -> str:
        """Rare shapes and a failed compilation run the plain layers."""
        return "default" if self.compiler.active and not self.rare else "force_eager"

    def bank(self, edge: int, config: dict) -> ImageBank:
        if edge not in self.banks:
            codec = self.codec if config.get("edge") == edge else self.plain_codec
            bank = ImageBank(edge, config, self.state, self.source, codec, self.sprites)
            self.log.write("bank", edge=edge, **bank.fill(config["fill_seconds"]))
            self.banks[edge] = bank
        return self.banks[edge]


def train_prompt_encoders(run: ImageRun, reserve: float) -> None:
    """Teach both encoders to say what captions mean, over short and long padding; then freeze."""
    state, config, device = run.state, run.state.config["text"], run.state.device
    rng = random.Random(11)
    scenes = [random_scene(rng, False) for _ in range(config["captions"])]
    ids, _ = tokenize(state.tokenizer, [caption(s, rng) for s in scenes], device)
    labels = {k: v.to(device) for k, v in caption_labels(scenes).items()}
    heads = TextHeads(config["dim"]).to(device)
    pooled_heads = TextHeads(config["pooled_dim"]).to(device)
    torch.nn.init.normal_(state.text.shared.weight, std=1.0)
    modules = (state.text, state.clip, heads, pooled_heads)
    params = (p for module in modules for p in module.requires_grad_(True).parameters())
    descent = Descent(params, config["lr"])

    def step(progress: float) -> dict[str, Tensor]:
        padded = rng.choice((TOKENS,) * 6 + (64, 128, 512))
        n = max(8, config["batch"] * TOKENS // padded)
        index = torch.randint(len(ids), (n,), device=device)
        hidden, pooled = encode_prompts(state.text, state.clip, ids[index], padded)
        said = {k: v[index] for k, v in labels.items()}
        mask = (ids[index] != 0).long()
        logits = heads(hidden[:, :TOKENS], mask)
        whole = pooled_heads(pooled[:, None], mask[:, :1])
        # padding says nothing: all of it shall look the same
        loose = hidden[:, TOKENS:] if padded > TOKENS else hidden[:, -8:]
        spread = (loose - loose.mean((0, 1), keepdim=True)).square().mean()
        loss = text_loss(logits, said) + text_loss(whole, said) + 0.1 * spread
        descent.step(loss, progress)
        with torch.no_grad():
            right = (logits["object"].argmax(1) == said["object"]).float().mean()
            colour = (logits["colour"].argmax(1) == said["colour"]).float().mean()
        return {"loss": loss.detach(), "object": right, "colour": colour, "spread": spread.detach()}

    run_stage(run, "text", step, config["seconds"], reserve)
    for module in (state.text, state.clip):
        module.eval().requires_grad_(False)


def train_codec(run: ImageRun, reserve: float) -> None:
    """The autoencoder on windows of pictures of several sizes; then its statistics folded in."""
    state, config = run.state, run.state.config["codec"]
    descent = Descent.of_codec(state.vae.parameters(), config["lr"], 200)
    pool = run.source.pool_of("pictures", 4, state.device)
    rng, crop = random.Random(5), config["crop"]

    codec = run.plain_codec

    def step(progress: float) -> dict[str, Tensor]:
        nonlocal codec
        if codec is run.plain_codec and run.probes.settled("codec"):
            codec = run.codec
        edge = rng.choice(config["edges"])
        frames = _window(run, pool, config["batch"], edge, crop, rng)
        with autocast(run.state.device):
            loss, error = codec_loss(codec, frames, config["kl"])
        descent.step(loss, progress)
        return {"loss": loss.detach(), "psnr": -10 * torch.log10(error / 4)}

    guarded = run.codec_compiler.guard(step, run.log, "codec")
    run_stage(run, "codec", guarded, config["seconds"], reserve)
    _finish_codec(run, pool)


def _window(
    run: ImageRun, pool: Batch, n: int, edge: int, crop: int, rng: random.Random
) -> Tensor:
    """The same window of `crop` pixels out of n fresh pictures of `edge` pixels."""
    index = torch.randint(len(pool), (n,), device=run.state.device)
    frames = render(pool[index].fresh_noise(), run.sprites, edge)[:, 0]
    crop = min(crop, edge)
    top, left = rng.randrange(edge - crop + 1), rng.randrange(edge - crop + 1)
    return frames[:, :, top : top + crop, left : left + crop]


@torch.no_grad()
def _finish_codec(run: ImageRun, pool: Batch) -> None:
    state, rows, figures = run.state, [], {}
    base, rng = state.config["edge"], random.Random(0)
    for edge in (base // 2, base, base * 2):
        total = []
        for _ in range(3):
            frames = _window(run, pool, 16, edge, edge, rng)
            with autocast(run.state.device):
                mean = run.plain_codec.encode(frames)[:, :CHANNELS]
                back = run.plain_codec.decode(mean).float().clamp(-1, 1)
            total.append((back - frames).square().mean().item())
            rows.append(mean.float().transpose(0, 1).flatten(1)[:, :: max(1, edge // 64)])
        figures[str(edge)] = -10 * math.log10(sum(total) / len(total) / 4)
    table = torch.cat(rows, 1)
    fold_statistics(state.vae, table.mean(1), table.std(1).clamp_min(1e-3))
    state.vae.requires_grad_(False)
    state.record["figures"]["codec_psnr"] = figures
    run.log.write("codec", psnr=figures, std=[round(v, 3) for v in table.std(1).tolist()])


def _step(run: ImageRun, bank: ImageBank, batch: int, config: dict, scale: float, **more) -> Tensor:
    state = run.state
    with autocast(run.state.device), torch.compiler.set_stance(run.stance):
        loss = joint_loss(
            run.joint, *bank.sample(batch, **more), config["shift"], config["tail"]
        )
        loss.backward()
    torch.nn.utils.clip_grad_norm_(state.denoiser.parameters(), 1.0)
    state.optimizer.step(scale)
    state.average.update()
    return loss.detach()


def train_small(run: ImageRun, reserve: float) -> None:
    """The denoiser on pictures of half the size: objects and words at a quarter of the cost."""
    config, stage = run.state.config["small"], run.state.stage("small")
    bank, count = run.bank(config["edge"], config), 0
    run.compiler.active = run.probes.allows("small", 30)

    def step(progress: float) -> dict[str, Tensor]:
        nonlocal count
        if count % config["refresh_every"] == config["refresh_every"] - 1:
            bank.renew()
        scale = min(1.0, (count + 1) / (200 if stage["steps"] == 0 else 50))
        count += 1
        return {"loss": _step(run, bank, config["batch"], config, scale)}

    run_stage(run, "small", step, config["seconds"], reserve)
    check(run, config["edge"])
    run.banks.clear()


def train_full(run: ImageRun, reserve: float, last: bool) -> None:
    """The denoiser at full size, with shares of larger pictures and of long padding."""
    config, large = run.state.config["full"], run.state.config["large"]
    stage = run.state.stage("full")
    main = run.bank(config["edge"], config)
    others = [run.bank(edge, large) for edge in large["edges"]]
    run.compiler.active = run.probes.allows("full", 20)
    goal = config["seconds"]
    if last:
        goal = stage["spent"] + max(run.log.left() - reserve, 0.1)
    rng, count, begin = random.Random(8), 0, stage["spent"]

    def step(progress: float) -> dict[str, Tensor]:
        nonlocal count
        tail = max(0.0, (progress - config["decay_from"]) / (1 - config["decay_from"]))
        scale = min(1.0, (count + 1) / 50) * (1 - 0.97 * tail)
        if count % config["refresh_every"] == config["refresh_every"] - 1:
            main.renew()
        count += 1
        draw = rng.random()
        if draw < config["large_share"]:
            bank = rng.choice(others)
            if rng.random() < 1 / large["refresh_every"]:
                bank.renew()
            batch = max(1, large["tokens"] // (bank.edge // 16) ** 2)
            run.rare = True
            return {f"loss_{bank.edge}": _step(run, bank, batch, large, scale)}
        if draw < config["large_share"] + config["long_share"]:
            batch = max(1, config["batch"] * 2 // 3)
            run.rare = True
            return {"loss_long": _step(run, main, batch, config, scale, padded=512)}
        run.rare = False
        return {"loss": _step(run, main, config["batch"], config, scale)}

    # run_stage counts progress from what the stage had spent before; here a part is one check
    every = run.state.config["evaluation"]["check_every"]
    while stage["spent"] < goal - 0.5 and run.log.left() > reserve + 1:
        until = min(goal, stage["spent"] + every)
        share = lambda p, u=until: step(min(1.0, p * u / goal))  # noqa: E731
        run_stage(run, "full", share, until, reserve)
        check(run, config["edge"])
        run.save()
    run.rare = False
    stage["done"] = stage["spent"] >= goal - 0.5
    run.log.write("full", spent=stage["spent"] - begin, goal=goal)
