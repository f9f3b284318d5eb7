"""What generated pictures and clips show, by our own classifier: the quality measure of FastDiff.

    from training.evaluator import Evaluator

    judge = Evaluator("cuda")
    judge.pictures(frames, prompts)     # {"samples": 256, "object": 0.98, "colour": ...}
    judge.clips(video, prompts)         # the same with direction, stability of shape
    judge.distance(fast, stock)         # feature distance between two sets of frames

Frames are in [0, 1] or [-1, 1]: say which by `low`. Any size; the classifier sees 256 pixels.
How far it can be trusted: `benchmarks/results/evaluator.json`, written by
`benchmarks/evaluator.py`. It knows the forty objects of `training/data` on plain, gradient,
striped or dotted ground and calls everything else one of them; it leans on colour and texture.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import COLOUR_NAMES, COLUMNS, MOTIONS, NAMES, PATTERNS, ROWS, Scene, place_phrase
from .judge import load_judge
from .sampling import judge

EDGE = 256
APART = 4
"""Frames between the two of a pair whose shapes are compared: a quarter second at 16 a second."""


def asked(prompt: str) -> Scene:
    """The scene that a canonical caption names, such as "a frog moving up on a red background".

    Raises ValueError where the object or the background colour is none of ours.
    """
    before, _, ground = prompt.lower().rpartition(" on a")
    words = ground.removeprefix("n").split()
    colours = [i for i, name in enumerate(COLOUR_NAMES) if name in words]
    objects = [i for i, name in enumerate(NAMES) if name in before]
    if not colours or not objects:
        raise ValueError(
            f"prompt {prompt!r} names no object of ours on a coloured background; "
            'the form is "a red apple moving left on a blue background"'
        )
    # "star" is in no other name today, but the longest match is the safe one
    obj = max(objects, key=lambda i: len(NAMES[i]))
    pattern = next((i for i, name in enumerate(PATTERNS) if name in words), 0)
    motion = next((i for i, name in enumerate(MOTIONS) if name in before), None)
    places = [(c, r) for c in range(len(COLUMNS)) for r in range(len(ROWS))]
    found = [p for p in places if place_phrase(p) in before]
    place = max(found, key=lambda p: len(place_phrase(p))) if found else None
    return Scene(obj, colours[0], pattern, motion, place)


class Evaluator:
    """The committed classifier, frozen, in fp32 on `device`."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.model = load_judge(self.device)

    def pictures(
        self, frames: Tensor, prompts: Sequence[str | Scene], low: float = 0.0
    ) -> dict[str, float]:
        """Figures of frames [B, 3, H, W] in [low, 1] against what their prompts asked for.

        samples; object (top-1), object_top5, colour, pattern: shares that are right; place: the
        share at the asked position, of the `placed` ones; sharpness: see `sharpness`.
        """
        return self.clips(frames[:, None], prompts, low)

    @torch.no_grad()
    def clips(
        self, video: Tensor, prompts: Sequence[str | Scene], low: float = 0.0
    ) -> dict[str, float]:
        """Figures of video [B, T, 3, H, W] in [low, 1], as `pictures`, and those of motion.

        An object or colour is the mean verdict over a clip. object_every_frame: the share of
        frames that show the asked object. direction: the share of the asked left, right, up and
        down that was taken; moving_left and the other motions one by one. shape_stability: see
        there.
        """
        scenes = [asked(p) if isinstance(p, str) else p for p in prompts]
        if len(scenes) != len(video):
            raise ValueError(f"{len(video)} samples but {len(scenes)} prompts: one for each")
        video = _signed(video, low)
        small = self._small(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        found = judge(self.model, small, scenes)
        figures = {"samples": len(video), "object": found.pop("object_top1"), **found}
        figures["sharpness"] = self.sharpness(video.flatten(0, 1), -1.0).mean().item()
        if video.shape[1] > APART:
            figures["shape_stability"] = self.shape_stability(video, -1.0).mean().item()
        return figures

    @torch.no_grad()
    def features(self, frames: Tensor, low: float = 0.0) -> Tensor:
        """[N, 192] of frames [N, 3, H, W] in [low, 1]: what the verdicts are read from."""
        found = []
        for part in self._small(_signed(frames, low)).split(256):
            early = self.model.early(F.avg_pool2d(part, 2))
            found.append(self.model.late(early).mean((2, 3)))
        return torch.cat(found)

    def distance(self, frames: Tensor, others: Tensor, low: float = 0.0) -> float:
        """Kernel distance of two sets of frames [N, 3, H, W] in [low, 1]: 0 for the same set.

        The squared maximum mean discrepancy of the features with the cubic kernel of the kernel
        inception distance (Binkowski et al. 2018), in its biased form, which is never below 0: the
        two sets share their prompts, so they are no independent draws. Other draws of the same
        prompts set the floor, see `benchmarks/results/evaluator.json`.
        """
        x, y = self.features(frames, low).double(), self.features(others, low).double()
        if min(len(x), len(y)) < 1:
            raise ValueError(f"sets of {len(x)} and {len(y)} frames: neither may be empty")
        return float(_cubic(x, x).mean() + _cubic(y, y).mean() - 2 * _cubic(x, y).mean())

    @torch.no_grad()
    def sharpness(self, frames: Tensor, low: float = 0.0) -> Tensor:
        """[N]: how steep the steepest edges of frames [N, 3, H, W] are, in brightness a pixel.

        The 99th percentile of the gradient of brightness in [0, 1]. An edge of contrast c that is
        blurred over w pixels has c / w; compare frames of one size and of the same prompts only.
        """
        weights = frames.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        light = (_signed(frames, low).float() / 2 + 0.5).mul(weights).sum(1)
        dx = light[:, 1:, 1:] - light[:, 1:, :-1]
        dy = light[:, 1:, 1:] - light[:, :-1, 1:]
        steep = torch.sqrt(dx * dx + dy * dy).flatten(1)
        rank = max(1, round(0.99 * steep.shape[1]))
        return steep.kthvalue(rank, dim=1).values

    @torch.no_grad()
    def shape_stability(self, video: Tensor, low: float = 0.0) -> Tensor:
        """[B]: how alike frames a quarter second apart are, of video [B, T, 3, H, W] in [low, 1].

        Mean cosine of their features, which say what is shown and hardly where: 1 is the same
        shape. Renders set the scale, by motion, in `benchmarks/results/evaluator.json`.
        """
        b, t = video.shape[:2]
        if t <= APART:
            raise ValueError(f"a clip of {t} frames: more than {APART} are needed")
        features = self.features(video.flatten(0, 1), low).unflatten(0, (b, t))
        return F.cosine_similarity(features[:, :-APART], features[:, APART:], dim=-1).mean(1)

    def _small(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.device, torch.float32)
        if frames.shape[-2:] == (EDGE, EDGE):
            return frames
        shrink = min(frames.shape[-2:]) >= EDGE
        return F.interpolate(frames, size=(EDGE, EDGE), mode="area" if shrink else "bilinear")


def _signed(frames: Tensor, low: float) -> Tensor:
    """Frames of [low, 1] in [-1, 1]."""
    if low not in (0.0, -1.0):
        raise ValueError(f"low={low}: frames are in [0, 1] (low=0.0) or in [-1, 1] (low=-1.0)")
    return frames if low else frames * 2 - 1


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
