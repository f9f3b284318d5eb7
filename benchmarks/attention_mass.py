"""Where attention lies, by tile, layer and head: trained weights against random ones.

python benchmarks/attention_mass.py                    # docs/images and results/attention_mass.json
python benchmarks/attention_mass.py --tiny -o /tmp/look    # random calls of a few steps

One conditional forward in the middle of a run is caught; the same architecture with random
weights, as diffusers draws them, is given the very same input.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
import record  # noqa: E402
import sheets  # noqa: E402
from chart import BLUE, FAINT, GRAY, GREEN, INK, ORANGE, Chart, save  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff import models  # noqa: E402
from fastdiff.api import find_denoisers  # noqa: E402
from fastdiff.layout import TokenLayout, even_blocks  # noqa: E402
from fastdiff.policies import Context, Policy  # noqa: E402
from fastdiff.policies.base import Attended, Terms  # noqa: E402

PROMPTS = {"tiny-video": "a red apple moving left on a blue background",
           "tiny-image": "a red apple on a blue background"}
BLOCK, SHARES = 64, (0.10, 0.25, 0.50)
OCTAVES, MAP = 4.0, 80


@dataclass(frozen=True)
class Mass:
    """Attention of a layer. tiles: [H, N, N], mean mass that a tile of queries gives each tile of
    keys; text: [H], the share that goes to text. Rows of tiles and text add up to 1.
    """

    tiles: Tensor
    text: Tensor

    def share(self, of_tiles: float) -> Tensor:
        """[H]: part of the mass on the picture that its best tiles hold, mean over query tiles.

        of_tiles: how many are taken, as a share; a part of a tile counts in part.
        """
        best = self.tiles.sort(-1, descending=True).values
        best = best / best.sum(-1, keepdim=True)
        take = (of_tiles * best.shape[-1] - torch.arange(best.shape[-1])).clamp(0, 1)
        return (best * take).sum(-1).mean(-1)


def mass_of(query: Tensor, key: Tensor, layout: TokenLayout) -> Mass:
    """Exact attention of query, key [1, S, H, D], summed over tiles of keys.

    Tiles are the blocks of 64 tokens that `tile-sparse` cuts; queries are those of the grid.
    """
    cut = even_blocks(TokenLayout(layout.grid), BLOCK, 0, torch.device("cpu"))
    place = cut.order + layout.before
    member = torch.repeat_interleave(torch.arange(cut.blocks), cut.lengths.long())
    found, text = [], []
    for q, k in zip(query[0].float().unbind(1), key[0].float().unbind(1), strict=True):
        mass = (q[place] @ k.T * q.shape[-1] ** -0.5).softmax(-1)
        grid = mass[:, place]
        by_key = torch.zeros(len(place), cut.blocks).index_add_(1, member, grid)
        both = torch.zeros(cut.blocks, cut.blocks).index_add_(0, member, by_key)
        found.append(both / cut.lengths[:, None])
        text.append(1 - grid.sum(1).mean())
    return Mass(torch.stack(found), torch.stack(text))


class Watch(Policy):
    """Measures calls while `_open` and stays dense."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended | None:
        if _open:
            _found[context.layer] = mass_of(query.cpu(), key.cpu(), context.layout)
        return None

    def select(self, *_: Any) -> None:
        return None


_found: dict[int, Mass] = {}
_open = False


class _Enough(Exception):
    """The forward that was wanted has run."""


def caught(name: str, args: argparse.Namespace) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The denoiser and the input of its conditional forward in the middle of a run."""
    model = models.find(name)
    best = model.defaults
    pipe = models.load(model, args.device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    steps = args.steps or best.steps or 20
    handle = fastdiff.enable(pipe, _watch())
    denoiser = next(iter(find_denoisers(pipe).values()))
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def capture(_: Any, given: tuple, named: dict[str, Any]) -> None:
        if (handle.clock.step, handle.clock.branch) == (steps // 2, "cond"):
            seen.append((given, named))
            raise _Enough

    hook = denoiser.register_forward_pre_hook(capture, with_kwargs=True)
    call: dict[str, Any] = {"height": args.size or best.height, "width": args.size or best.width,
                            "num_inference_steps": steps, **best.arguments}
    if best.guidance is not None:
        call["guidance_scale"] = best.guidance
    if "video" in best.kind:
        call["num_frames"] = best.frames
    try:
        pipe(PROMPTS[name], output_type="latent", generator=torch.Generator().manual_seed(0),
             **call)
    except _Enough:
        pass
    finally:
        hook.remove()
        fastdiff.disable(pipe)
    return denoiser, *seen[0]


def _watch() -> Watch:
    return Watch(dense_steps=0, min_tokens=1, max_density=1.0)


@torch.no_grad()
def measured(model: nn.Module, given: tuple, named: dict[str, Any]) -> list[Mass]:
    """The mass of every self-attention layer in one forward."""
    global _open
    _found.clear()
    fastdiff.enable(model, _watch())
    _open = True
    try:
        model(*given, **named)
    finally:
        _open = False
        fastdiff.disable(model)
    return [_found[layer] for layer in sorted(_found)]


def maps(sides: dict[str, list[Mass]]) -> Image.Image:
    """Layers down, heads across; trained beside random. Blue is less than even, red is more."""
    joint = any(float(mass.text.max()) > 1e-6 for masses in sides.values() for mass in masses)
    blocks = []
    for words, masses in sides.items():
        rows = []
        for layer, mass in enumerate(masses):
            heads = []
            for head, tiles in enumerate(mass.tiles):
                level = (tiles * tiles.shape[-1]).clamp_min(1e-9).log2() / OCTAVES
                edge = len(level) * max(1, MAP // len(level))
                picture = coloured(level).resize((edge, edge), Image.Resampling.NEAREST)
                text = f", text {mass.text[head]:.2f}" if joint else ""
                caption = sheets.text(f"{layer + 1}.{head + 1}{text}", edge)
                heads.append(sheets.below([picture, caption]))
            rows.append(sheets.beside(heads, 4))
        body = sheets.below(rows, 2)
        blocks.append(sheets.below([sheets.text(f"{words}: layer.head", body.width), body]))
    body = sheets.beside(blocks, 20)
    ramp = coloured(torch.linspace(-1, 1, 121)[None].expand(10, -1))
    legend = sheets.beside([ramp, sheets.text(
        f"1/{2**OCTAVES:.0f} of an even share or less, even, {2**OCTAVES:.0f} times or more",
        body.width - 127)], 6)
    return sheets.below([body, legend], 4)


def coloured(level: Tensor) -> Image.Image:
    """level [H, W]: -1 blue, 0 white, 1 dark red; beyond is cut."""
    up, down = level.clamp(0, 1)[..., None], (-level).clamp(0, 1)[..., None]
    white, red, blue = (torch.tensor(c, dtype=torch.float32)
                        for c in ((255, 255, 255), (120, 10, 20), (0, 90, 170)))
    pixels = white + up * (red - white) + down * (blue - white)
    return Image.fromarray(pixels.round().byte().numpy())


def panel(name: str, sides: dict[str, list[Mass]]) -> Chart:
    """By layer: share of the mass that the best 10, 25 and 50 % of key tiles hold."""
    masses = sides["trained"]
    chart = Chart((430, 330), (0.4, len(masses) + 0.6), (0, 1))
    tiles = masses[0].tiles.shape[-1]
    chart.axes(f"{name}: mass held by the best key tiles, of {tiles}", "layer",
               "share of the mass on the picture",
               [(i + 1, str(i + 1)) for i in range(len(masses))],
               [(v / 100, f"{v} %") for v in (0, 25, 50, 75, 100)])
    for share, colour, shift in zip(SHARES, (BLUE, ORANGE, GREEN), (-0.22, 0, 0.22), strict=True):
        chart.line([(chart.x[0], share), (chart.x[1], share)], colour, 0.8, dashed=True)
        for side, masses in sides.items():
            for i, mass in enumerate(masses):
                x = i + 1 + shift + (0.09 if side == "random" else 0)
                heads = mass.share(share)
                ink = colour if side == "trained" else GRAY
                chart.line([(x, float(heads.min())), (x, float(heads.max()))], ink, 1.2)
                chart.point(x, float(heads.mean()), colour, 3.2, side == "random")
    return chart


def key_panel() -> Chart:
    """What the signs of the other panels mean."""
    chart = Chart((170, 330), (0, 1), (0, 1))
    chart.left, chart.right = 8, 160
    lines = [(f"best {share:.0%} of tiles", colour) for share, colour in
             zip(SHARES, (BLUE, ORANGE, GREEN), strict=True)]
    for i, (words, colour) in enumerate(lines):
        y = 0.95 - 0.09 * i
        chart.point(0.05, y, colour)
        chart.words(*chart.at(0.13, y), words)
    for y, colour, hollow, words in ((0.62, INK, False, "trained"), (0.53, INK, True, "random")):
        chart.point(0.05, y, colour, hollow=hollow)
        chart.words(*chart.at(0.13, y), words)
    chart.line([(0.05, 0.40), (0.05, 0.48)], INK, 1.2)
    chart.words(*chart.at(0.13, 0.44), "least to most, heads")
    chart.line([(0, 0.35), (0.1, 0.35)], INK, 0.8, dashed=True)
    chart.words(*chart.at(0.13, 0.35), "if attention were even")
    chart.line([(0, 0.30), (1, 0.30)], FAINT, 0.5)
    chart.words(*chart.at(0.0, 0.25), "dot: mean over heads")
    return chart


def rows_of(name: str, side: str, masses: list[Mass]) -> list[dict[str, Any]]:
    rows = []
    for layer, mass in enumerate(masses):
        row: dict[str, Any] = {"model": name, "weights": side, "layer": layer + 1,
                               "heads": len(mass.text), "tiles": mass.tiles.shape[-1],
                               "text": float(mass.text.mean())}
        for share in SHARES:
            row[f"best_{share:g}"] = [round(v, 4) for v in mass.share(share).tolist()]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="of the run, instead of the model's own")
    parser.add_argument("--size", type=int, help="instead of the model's own")
    parser.add_argument("--tiny", action="store_true", help="2 steps at 128 pixels")
    parser.add_argument("-o", "--output", type=Path,
                        help="folder for all files; default: docs/images and benchmarks/results")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.size = 2, 128
        if args.output is None:
            parser.error("--tiny needs -o FOLDER: its pictures are not the documented ones")
    images = args.output or HERE.parent / "docs/images"
    rows, panels = [], []
    for name in args.model:
        model, given, named = caught(name, args)
        torch.manual_seed(0)
        random: Any = type(model).from_config(model.config)  # pyright: ignore[reportAttributeAccessIssue]
        sides = {"trained": measured(model, given, named),
                 "random": measured(random.eval().to(args.device), given, named)}
        sheets.save_png(maps(sides), images / f"attention-mass-{name}.png", 160,
                        dither=False)
        panels.append(panel(name, sides))
        for side, masses in sides.items():
            rows += rows_of(name, side, masses)
    save([*panels, key_panel()], images / "attention-share.png")
    settings = {"prompts": {k: PROMPTS[k] for k in args.model},
                "sha256": {k: models.find(k).sha256 for k in args.model},
                "steps": args.steps or "own", "size": args.size or "own",
                "step": "the middle one, conditional", "block": BLOCK, "seed": 0}
    record.write((args.output or record.RESULTS) / "attention_mass.json", "attention_mass",
                 args.device, settings, rows)


if __name__ == "__main__":
    main()
