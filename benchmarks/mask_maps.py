"""Draw what every attention method keeps in a layer of the shipped video model; tell what it loses.

python benchmarks/mask_maps.py          # docs/images/mask-maps.png and results/mask_maps.json
python benchmarks/mask_maps.py --tiny   # random tensors of a small grid, nothing is written
"""

import argparse
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
import record  # noqa: E402

from fastdiff.clock import StepClock  # noqa: E402
from fastdiff.kernels.block_pool import block_pool  # noqa: E402
from fastdiff.kernels.block_sparse_attention import block_sparse_attention  # noqa: E402
from fastdiff.layout import TokenLayout  # noqa: E402
from fastdiff.models import defaults, load  # noqa: E402
from fastdiff.policies import Context, Policy, methods  # noqa: E402
from fastdiff.policies.base import Attended, Terms  # noqa: E402

PROMPT, FRAMES = "a red apple moving left on a blue background", 33
PICTURE, LIMIT = HERE.parent / "docs/images/mask-maps.png", 100_000
MAP, GAP, TITLE, SHADES = 144, 6, 16, 32
ROOM = 512
# what shows a method's idea better than its defaults
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "vmoba": [{"cycle": (1, 0, 0)}, {"cycle": (0, 1, 0)}, {"cycle": (0, 0, 1)}],
    "neighborhood": [{}, {"stride": (1, 1, 1)}],
    "bands": [{"band": "frames"}, {"band": "pixels"}],
    "sparse-vdit": [{"modes": "d"}, {"modes": "m"}, {"modes": "v"}],
}


@dataclass
class Call:
    """One attention call of a layer: query, key, value [B, S, H, D] in raster order."""

    query: Tensor
    key: Tensor
    value: Tensor
    context: Context

    @property
    def mass(self) -> Tensor:
        """Attention, [B, H, S, S]: the whole map, for small sequences."""
        q, k = self.query.transpose(1, 2), self.key.transpose(1, 2)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class Watch(Policy):
    """Keeps the calls of one step and stays dense."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, terms: Terms
    ) -> Attended | None:
        clock = context.clock
        if (clock.step, clock.branch) == _wanted and context.layer not in _calls:
            held = Context(context.layout, StepClock(step=clock.step, steps=clock.steps),
                           context.layer, context.seed)
            _calls[context.layer] = Call(query.float(), key.float(), value.float(), held)
        return None

    def select(self, *_: Any) -> None:
        return None


_calls: dict[int, Call] = {}
_wanted: tuple[int, str] = (3, "cond")


def watched(step: int) -> list[Call]:
    """Every layer's call in one step of the shipped model, conditional branch."""
    global _wanted
    _wanted = (step, "cond")
    pipe = load("tiny-video", device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_fastdiff(Watch(dense_steps=0, min_tokens=1, max_density=1.0))
    own = defaults("tiny-video")
    pipe(PROMPT, height=own.height, width=own.width, num_frames=FRAMES, output_type="latent",
         num_inference_steps=own.steps, guidance_scale=own.guidance, **own.arguments,
         generator=torch.Generator().manual_seed(0))
    return [_calls[layer] for layer in sorted(_calls)]


def random_calls() -> list[Call]:
    layout = TokenLayout((5, 6, 8), 0, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.tokens, 2, 16, generator=generator) for _ in range(3))
    return [Call(q, k, v, Context(layout, StepClock(step=3, steps=8), layer)) for layer in (0, 1)]


def attended(
    policy: Policy, call: Call, value: Tensor, scale: float | None = None
) -> tuple[Tensor, float, Tensor | None]:
    """Output as the op makes it, density, and the kept pairs where a block mask tells them."""
    found = policy.attend(call.query, call.key, value, call.context, Terms(scale=scale))
    if found is not None:
        return found.output, float(found.density), None
    tiles = policy.tiles(call.context.layout, call.query, call.context)
    q, k, v = (x[:, tiles.order] for x in (call.query, call.key, value))
    mask = policy.select(q, k, tiles, call.context)
    if mask is None:
        raise ValueError(f"{policy.name} chose dense")
    tail = None
    if policy.tail:
        (key_mean, weight), (value_mean, _) = (
            block_pool(x, tiles.offsets, block=tiles.block) for x in (k, v))
        tail = (key_mean, value_mean, weight, mask.keep.contiguous())
    out = cast(Tensor, block_sparse_attention(
        q, k, v, *mask.lists(), tiles.offsets, tiles.offsets, block_q=tiles.block,
        block_k=tiles.block, tail=tail, scale=scale))
    keep = mask.to_dense()[:, :, tiles.inverse][..., tiles.inverse]
    return out[:, tiles.inverse], float(mask.density()), keep


def kept(policy: Policy, call: Call) -> Tensor:
    """bool [B, H, S, S]: the pairs that a policy keeps, by which values reach which outputs."""
    _, _, keep = attended(policy, call, call.value)
    if keep is not None:
        return keep
    # zeros behind query and key change no score, and make room to mark more values at a time
    tokens, width = call.value.shape[1], call.value.shape[3]
    q, k = (torch.nn.functional.pad(x, (0, ROOM - width)) for x in (call.query, call.key))
    wide = Call(q, k, k, call.context)
    seen = []
    for begin in range(0, tokens, ROOM):
        span = torch.arange(begin, min(tokens, begin + ROOM))
        marked = torch.zeros_like(k)
        marked[:, span, :, span - begin] = 1
        out, _, _ = attended(policy, wide, marked, width**-0.5)
        seen.append(out.transpose(1, 2)[..., : len(span)] > 0)
    return torch.cat(seen, -1)


def probe(policy: Policy, calls: list[Call]) -> dict[str, float]:
    """Density and error of the output, each a mean over the layers."""
    rows = []
    for call in calls:
        out, density, _ = attended(policy, call, call.value)
        dense = (call.mass @ call.value.transpose(1, 2)).transpose(1, 2)
        rows.append((density, float((out - dense).norm() / dense.norm())))
    means = torch.tensor(rows).mean(0).tolist()
    return dict(zip(("density", "output_error"), means, strict=True))


def drawing(level: Tensor, call: Call, title: str) -> Image.Image:
    """level: [S_grid, S_grid] in 0 to 1, for one head; the map, and one query's keys by frame."""
    frames, height, width = call.context.layout.grid
    scale = max(1, MAP // height)
    sheet = Image.new("L", (MAP + (GAP + width * scale) * frames, TITLE + max(MAP, height * scale)),
                      255)
    ImageDraw.Draw(sheet).text((0, 2), title, fill=0)
    whole = torch.nn.functional.interpolate(level[None, None], (MAP, MAP), mode="area")[0, 0]
    sheet.paste(_shades(whole), (0, TITLE))
    centre = (frames // 2 * height + height // 2) * width + width // 2
    for frame, keys in enumerate(level[centre].view(frames, height, width)):
        picture = _shades(keys).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        if frame == frames // 2:
            x, y = centre % width * scale, centre // width % height * scale
            ImageDraw.Draw(picture).rectangle((x, y, x + scale - 1, y + scale - 1), fill=255)
            ImageDraw.Draw(picture).ellipse((x + 1, y + 1, x + scale - 2, y + scale - 2), fill=0)
        sheet.paste(picture, (MAP + GAP + frame * (GAP + width * scale), TITLE))
    return sheet


def _shades(level: Tensor) -> Image.Image:
    steps = (level.clamp(0, 1) * (SHADES - 1)).round() / (SHADES - 1)
    return Image.fromarray((235 - 195 * steps).to(torch.uint8).numpy().astype(np.uint8))


def save(rows: list[Image.Image]) -> None:
    sheet = Image.new("L", (max(r.width for r in rows), sum(r.height + GAP for r in rows)), 255)
    top = 0
    for part in rows:
        sheet.paste(part, (0, top))
        top += part.height + GAP
    data = io.BytesIO()
    sheet.quantize(SHADES).save(data, "PNG", optimize=True)
    if data.tell() > LIMIT:
        raise ValueError(f"the picture has {data.tell()} bytes, more than {LIMIT}")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    partial = PICTURE.with_suffix(".part")
    partial.write_bytes(data.getvalue())
    os.replace(partial, PICTURE)
    print(f"{PICTURE.relative_to(HERE.parent)}: {data.tell()} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random tensors, nothing is written")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--step", type=int, default=3, help="step of the run that is looked at")
    parser.add_argument("--layer", type=int, default=3, help="layer that is drawn")
    parser.add_argument("--head", type=int, default=0, help="head that is drawn")
    args = parser.parse_args()
    calls = random_calls() if args.tiny else watched(args.step)
    shown = calls[min(args.layer, len(calls) - 1)]
    layout = shown.context.layout
    grid = slice(layout.before, layout.before + layout.grid_tokens)
    mass = shown.mass[0, args.head, grid, grid]
    level = (mass / mass.amax(-1, keepdim=True)).clamp_min(1e-4).log10() / 4 + 1
    sheets = [drawing(level, shown, "attention itself, logarithmic; right: the keys of the dotted "
                                    "query, frame by frame")]
    rows = []
    for name, cls in methods().items():
        for options in OPTIONS.get(name, [{}]):
            policy = cls(density=args.density, **options)
            found = probe(policy, calls)
            keep = kept(policy, shown)
            found["kept_attention"] = float((shown.mass * keep).sum(-1).mean())
            told = ", ".join(f"{k}={v}" for k, v in options.items())
            title = (f"{name} {told}: keeps {found['kept_attention']:.2f} of this attention; "
                     f"density {found['density']:.2f}, output error {found['output_error']:.3f} "
                     f"over {len(calls)} layers")
            print(title, flush=True)
            sheets.append(drawing(keep[0, args.head, grid, grid].float(), shown, title))
            rows.append({"method": name, "options": options, "tail": policy.tail, **found})
    if not args.tiny:
        save(sheets)
        settings = {"model": "tiny-video", "prompt": PROMPT, "frames": FRAMES, **vars(args),
                    "grid": layout.grid, "layers": len(calls)}
        record.write(record.RESULTS / "mask_maps.json", "mask_maps", "cpu", settings, rows)


if __name__ == "__main__":
    main()
