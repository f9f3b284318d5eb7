"""What fewer tokens can gain at most on SDXL's UNet, by counting operations; no weights, no GPU.

python benchmarks/token_operations.py   # benchmarks/results/token_operations.json

A gain here is that of a machine on which time is operations and ranking costs nothing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
import token_models  # noqa: E402

from fastdiff.tokens.at_edm import AtEdm  # noqa: E402
from fastdiff.tokens.kv_downsample import KVDownsample  # noqa: E402


def count(edge: int, tiny: bool = False) -> dict[str, Any]:
    """Operations of one stock forward, a batch of two, and what is left of them by each method."""
    with torch.device("meta"):
        model: Any = token_models.sdxl(tiny)
    # plain products, which the counter sees
    model.set_attn_processor(AttnProcessor())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**token_models.inputs_of(edge, torch.float32, "meta", tiny))
    counts = counter.get_flop_counts()
    layers = [(name, module) for name, module in model.named_modules()
              if isinstance(module, BasicTransformerBlock)]
    deepest = max(module.attn1.inner_dim for _, module in layers)
    total, deep, attention, pruned, both = counter.get_total_flops(), 0.0, 0.0, 0.0, 0.0
    keep = AtEdm().keep
    fewer_keys = 1 - 1 / KVDownsample().factor ** 2
    for name, module in layers:
        width = module.attn1.inner_dim
        # the finest level that has attention is at half the latent's side, the deepest at a quarter
        tokens = (edge // 8 // (4 if width == deepest else 2)) ** 2
        whole = sum(counts[f"{type(model).__name__}.{name}"].values())
        scores = 2 * 2 * 2 * tokens ** 2 * width
        attention += scores
        # the first layer of a block stays whole
        if width == deepest and not name.endswith(".0"):
            saved = (whole - scores) * (1 - keep) + scores * (1 - keep ** 2)
            pruned, both = pruned + saved, both + saved
        else:
            both += fewer_keys * scores
        deep += whole if width == deepest else 0
    return {"edge": edge, "tera": total / 1e12, "deep_layers": deep / total,
            "self_attention": attention / total,
            "at_edm": 1 / (1 - pruned / total),
            "kv_downsample": 1 / (1 - fewer_keys * attention / total),
            "both": 1 / (1 - both / total)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    rows = [count(edge) for edge in (1024, 2048)]
    for row in rows:
        print(row)
    record.write(args.output / "token_operations.json", "token operations", "cpu",
                 {"model": "sdxl", "batch": 2, "keep": AtEdm().keep}, rows)


if __name__ == "__main__":
    main()
