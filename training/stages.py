"""The training stages in order: text, autoencoder, classifier, pictures, clips."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .autoencoder import FullSequence, autoencoder_loss, reconstruction_loss
from .bank import Bank
from .captions import caption
from .classifier import accuracy, classifier_loss, degrade
from .data import Batch, load_sprites, make_batch, random_scene, render
from .denoiser import LeanDenoiser, flow_loss
from .descent import Descent
from .progress import Compiler, Log, autocast, timed_loop
from .sampling import held_out_scenes, judge, sample
from .scenes import SceneSource
from .state import State
from .text import TextHeads, caption_labels, text_loss, tokenize


@dataclass
class Run:
    """What a stage needs besides the state; banks and pools are made when first asked for."""

    state: State
    log: Log
    compiler: Compiler
    source: SceneSource | None = None
    sprites: Tensor = field(init=False)
    pools: dict[str, Batch] = field(default_factory=dict)
    banks: dict[str, Bank] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sprites = load_sprites(self.state.device)
        self.codec = FullSequence(self.state.vae, self.compiler)
        self.lean = LeanDenoiser(self.state.denoiser, self.compiler)
        device = self.state.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def pool(self, kind: str) -> Batch:
        """Scenes without captions, for the autoencoder and the classifier."""
        if kind not in self.pools:
            chunks = 4 if kind == "pictures" else 3
            self.pools[kind] = self.source.pool_of(kind, chunks, self.state.device)
        return self.pools[kind]

    def judge_pool(self) -> None:
        """Scenes of all pairs: the judge learns what the generator is never shown."""
        if "judge" not in self.pools:
            rng = random.Random(17)
            scenes = [random_scene(rng, False, unseen=None) for _ in range(12288)]
            self.pools["judge"] = make_batch(scenes, rng).to(self.state.device)

    def draw(self, kind: str, n: int) -> Batch:
        pool = self.pool(kind)
        index = torch.randint(len(pool), (n,), device=self.state.device)
        return pool[index].fresh_noise()

    def bank(self, kind: str) -> Bank:
        if kind not in self.banks:
            bank = Bank(kind, self.state, self.source, self.codec, self.sprites)
            fill = self.compiler.guard(bank.fill, self.log, kind)
            filled = fill(self.state.config[kind]["fill_seconds"])
            self.log.write("bank", kind=kind, **filled)
            self.banks[kind] = bank
        return self.banks[kind]


def run_stage(
    run: Run, name: str, step: Callable[[float], dict[str, Tensor]], seconds: float, reserve: float
) -> None:
    """Spend what the stage has left of `seconds`; its record says whether it came to its end."""
    stage = run.state.stage(name)
    before, total = stage["spent"], seconds
    guarded = run.compiler.guard(step, run.log, name)

    def whole(progress: float) -> dict[str, Tensor]:
        return guarded((before + progress * (total - before)) / total)

    if total - before > 0.01 and run.log.left() > reserve:
        spent, steps = timed_loop(name, whole, total - before, run.log, run.state.device, reserve)
        stage["spent"] += spent
        stage["steps"] += steps
    stage["done"] = stage["spent"] >= total - 0.5


def train_text(run: Run, reserve: float) -> None:
    """Teach the encoder to say what captions mean, then freeze it."""
    state, config, device = run.state, run.state.config["text"], run.state.device
    rng = random.Random(11)
    scenes = [random_scene(rng, i % 2 == 1) for i in range(config["captions"])]
    ids, mask = tokenize(state.tokenizer, [caption(s, rng) for s in scenes], device)
    labels = {k: v.to(device) for k, v in caption_labels(scenes).items()}
    heads = TextHeads(config["dim"]).to(device)
    for name, p in state.text.named_parameters():
        p.requires_grad_(True)
        if "shared" in name or "embed_tokens" in name:
            torch.nn.init.normal_(p, std=1.0)
    descent = Descent([*state.text.parameters(), *heads.parameters()], config["lr"])

    def step(progress: float) -> dict[str, Tensor]:
        index = torch.randint(len(ids), (config["batch"],), device=device)
        hidden = state.text(ids[index], mask[index]).last_hidden_state
        logits = heads(hidden, mask[index])
        loss = text_loss(logits, {k: v[index] for k, v in labels.items()})
        descent.step(loss, progress)
        with torch.no_grad():
            right = (logits["object"].argmax(1) == labels["object"][index]).float().mean()
        return {"loss": loss.detach(), "object": right}

    run_stage(run, "text", step, config["seconds"], reserve)
    state.text.requires_grad_(False)


def train_autoencoder(run: Run, reserve: float) -> None:
    """Pictures and short clips in turn; afterwards the latent statistics."""
    state, config, edge = run.state, run.state.config["autoencoder"], run.state.config["edge"]
    descent = Descent.of_codec(state.vae.parameters(), config["lr"], 200)
    longest, rng = state.config["clip_frames"], random.Random(5)

    def step(progress: float) -> dict[str, Tensor]:
        clip = descent.steps % 2 == 1
        if clip:
            scenes = run.draw("clips", config["clip_batch"])
            start = rng.randrange(longest - config["clip_frames"] + 1)
            scenes = scenes.window(start, config["clip_frames"])
        else:
            scenes = run.draw("pictures", config["picture_batch"])
        video = render(scenes, run.sprites, edge)
        with autocast(run.state.device):
            loss, error = autoencoder_loss(run.codec, video, config["kl"])
        descent.step(loss, progress)
        kind = "clip" if clip else "picture"
        psnr = -10 * torch.log10(error / 4)
        return {f"{kind}_loss": loss.detach(), f"{kind}_psnr": psnr}

    run_stage(run, "autoencoder", step, config["seconds"], reserve)
    measure_latents(run)


def train_decoder(run: Run, reserve: float) -> None:
    """The decoder alone, on clips of full length: it has seen shorter ones only so far.

    The encoder is frozen, so the denoiser's latents stay what they are. A little noise on them
    stands for the denoiser's errors.
    """
    state, config, edge = run.state, run.state.config["decoder"], run.state.config["edge"]
    params = [*state.vae.decoder.parameters(), *state.vae.post_quant_conv.parameters()]
    descent = Descent.of_codec(params, config["lr"], 50)
    _, std = state.latent_statistics()
    std = std.view(1, 1, 16, 1, 1)

    def step(progress: float) -> dict[str, Tensor]:
        kind = "pictures" if descent.steps % 4 == 3 else "clips"
        video = render(run.draw(kind, config[f"{kind}_batch"]), run.sprites, edge)
        with autocast(run.state.device):
            with torch.no_grad():
                latents = run.codec.encode(video)[:, :, :16].float()
                level = config["noise"] * torch.rand(len(video), 1, 1, 1, 1, device=video.device)
                latents = latents + level * std * torch.randn_like(latents)
            frames = run.codec.decode(latents)
            loss = reconstruction_loss(frames, video)
        descent.step(loss, progress)
        error = torch.nn.functional.mse_loss(frames.detach().float().clamp(-1, 1), video)
        return {f"{kind}_loss": loss.detach(), f"{kind}_psnr": -10 * torch.log10(error / 4)}

    run_stage(run, "decoder", step, config["seconds"], reserve)
    measure_latents(run, keep=True)


@torch.no_grad()
def measure_latents(run: Run, keep: bool = False) -> None:
    """Channel means and deviations of the latents, into the config (not if `keep`); and PSNR."""
    state, rows, psnr = run.state, [], {}
    plain = FullSequence(state.vae)
    sizes = {"pictures": state.config["autoencoder"]["picture_batch"], "clips": 4}
    for kind, n in sizes.items():
        for _ in range(4):
            video = render(run.draw(kind, n), run.sprites, state.config["edge"])
            with autocast(run.state.device):
                mean = plain.encode(video)[:, :, :16]
                back = plain.decode(mean).float().clamp(-1, 1)
            psnr[kind] = -10 * math.log10((back - video).square().mean().item() / 4)
            rows.append(mean.float().transpose(0, 2).flatten(1))
    state.record["figures"]["autoencoder_psnr"] = psnr
    run.log.write("autoencoder", psnr=psnr)
    if keep:
        return
    table = torch.cat(rows, 1)
    mean = [round(v, 5) for v in table.mean(1).tolist()]
    std = [round(max(v, 1e-3), 5) for v in table.std(1).tolist()]
    state.set_latent_statistics(mean, std)
    run.log.write("autoencoder", latents_std=std)


def train_classifier(run: Run, reserve: float) -> None:
    """On degraded renders, half of them after a pass through the autoencoder."""
    state, config, edge = run.state, run.state.config["classifier"], run.state.config["edge"]
    model = state.classifier.requires_grad_(True).to(memory_format=torch.channels_last)
    descent = Descent(model.parameters(), config["lr"], decay=0.02)
    plain, rng = FullSequence(state.vae), random.Random(6)
    run.judge_pool()

    def look(scenes: Batch) -> Tensor:
        with torch.no_grad(), autocast(run.state.device):
            frames = render(scenes, run.sprites, edge)
            half = len(frames) // 2
            passed = plain.decode(plain.encode(frames[:half])[:, :, :16]).float().clamp(-1, 1)
            return torch.cat([passed, frames[half:]])[:, 0]

    def step(progress: float) -> dict[str, Tensor]:
        scenes = run.draw("judge", config["batch"])
        turn = torch.rand_like(scenes.angle)
        scenes.angle = torch.where(turn < 0.3, turn * (2 * math.pi / 0.3), scenes.angle)
        scale = torch.rand_like(scenes.size)
        scenes.size = torch.where(scale < 0.3, scenes.size * (0.6 + scale * 1.5), scenes.size)
        frames = degrade(look(scenes), rng).contiguous(memory_format=torch.channels_last)
        with autocast(run.state.device):
            out = model(frames)
        loss = classifier_loss(out, scenes)
        descent.step(loss, progress)
        right = (out["object"].argmax(1) == scenes.obj).float().mean()
        return {"loss": loss.detach(), "object": right}

    run_stage(run, "classifier", step, config["seconds"], reserve)
    model.eval().requires_grad_(False)
    check_classifier(run, look)


@torch.no_grad()
def check_classifier(run: Run, look: Callable[[Batch], Tensor]) -> None:
    """Its own accuracy on fresh renders of held-out pairs, half of them through the autoencoder."""
    state, rng = run.state, random.Random(99)
    n = state.config["classifier"]["check"]
    scenes = make_batch([random_scene(rng, False, unseen=True) for _ in range(n)], rng)
    scenes = scenes.to(state.device)
    parts = []
    for begin in range(0, n, 256):
        parts.append(state.classifier(look(scenes[begin : begin + 256])))
    out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    figures = {"renders": n, **accuracy(out, scenes)}
    state.record["figures"]["classifier"] = figures
    run.log.write("classifier", **figures)


def _denoiser_step(run: Run, kind: str, batch: int, scale: float) -> Tensor:
    state = run.state
    config = state.config[kind]
    loss = flow_loss(
        run.lean,
        *run.bank(kind).sample(batch),
        config["shift"],
        run.dtype,
        config.get("tail", 0.0),
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.denoiser.parameters(), 1.0)
    state.optimizer.step(scale)
    state.average.update()
    return loss.detach()


def train_pictures(run: Run, reserve: float, limit: float | None = None) -> None:
    """Pictures only; `limit` caps what this piece may spend."""
    config = run.state.config["pictures"]
    stage = run.state.stage("pictures")
    seconds = config["seconds"]
    if limit is not None:
        seconds = max(stage["spent"], min(seconds, stage["spent"] + limit))
    if seconds - stage["spent"] < 0.01 or run.log.left() < reserve + 15:
        stage["done"] = limit is not None
        return
    bank, count = run.bank("pictures"), 0

    def step(progress: float) -> dict[str, Tensor]:
        nonlocal count
        if count % config["refresh_every"] == config["refresh_every"] - 1:
            bank.renew()
        scale = min(1.0, (count + 1) / (200 if stage["steps"] == 0 else 50))
        count += 1
        return {"loss": _denoiser_step(run, "pictures", config["batch"], scale)}

    goal = seconds
    every = run.state.config["evaluation"]["check_every"]
    while stage["spent"] < goal - 0.5 and run.log.left() > reserve + 1:
        run_stage(run, "pictures", step, min(goal, stage["spent"] + every), reserve)
        quick_check(run, "pictures")
    stage["done"] = stage["spent"] >= goal - 0.5


def train_clips(run: Run, reserve: float, last: bool) -> None:
    """Clips with a share of picture steps; on the last piece the schedule ends with the piece."""
    config, pictures = run.state.config["clips"], run.state.config["pictures"]
    stage = run.state.stage("clips")
    if run.log.left() < reserve + config["fill_seconds"] + 10 and not last:
        return
    banks = {kind: run.bank(kind) for kind in ("clips", "pictures")}
    seconds = config["seconds"]
    if last:
        seconds = stage["spent"] + max(run.log.left() - reserve, 0.1)
    rng, count = random.Random(8), 0

    def step(progress: float) -> dict[str, Tensor]:
        nonlocal count
        tail = max(0.0, (progress - config["decay_from"]) / (1 - config["decay_from"]))
        scale = min(1.0, (count + 1) / 30) * (1 - 0.97 * tail)
        kind = "pictures" if rng.random() < config["picture_share"] else "clips"
        if count % config["refresh_every"] == config["refresh_every"] - 1:
            banks[kind].renew()
        count += 1
        batch = config["batch"] if kind == "clips" else pictures["batch"]
        return {f"{kind}_loss": _denoiser_step(run, kind, batch, scale)}

    run_stage(run, "clips", step, seconds, reserve)


def quick_check(run: Run, kind: str) -> None:
    """Object, colour and motion figures of a few samples by the average weights."""
    config = run.state.config["evaluation"]
    clip = kind == "clips"
    n = config["clips"] // 4 if clip else config["check_pictures"]
    scenes = held_out_scenes(n, clip)
    frames = run.state.config["clip_frames"] if clip else 1
    part = config["clip_batch"] if clip else config["check_pictures"]
    video = sample(run.state, scenes, frames, config["steps"], config["guidance"], part)
    figures = judge(run.state.classifier, video, scenes)
    run.state.record["figures"][f"check_{kind}"] = {"samples": n, **figures}
    run.log.write("check", kind=kind, samples=n, **figures)
