"""Token methods on the full-size SDXL UNet with random weights against SDPA; query-skip on Wan.

python benchmarks/tokens_gpu.py            # 1024 and 2048, fp16 and bf16; 3 minutes on an H200
python benchmarks/tokens_gpu.py --compile  # the same under torch.compile, fewer variants; longer
python benchmarks/tokens_gpu.py --tiny     # a smoke run on a CPU

One forward of a batch of two (classifier-free guidance) in the middle of a run of 50 steps. All
variants run in turn, round after round. The time of pruning does not depend on the weights; what
it does to pictures is measured in benchmarks/tokens.py.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import record  # noqa: E402
from denoisers import ARCHITECTURES, materialise  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.kernels.column_mass import column_mass, row_lse  # noqa: E402
from fastdiff.method import Method  # noqa: E402
from fastdiff.tokens.at_edm import AtEdm, rank_by_attention  # noqa: E402
from fastdiff.tokens.kv_downsample import KVDownsample  # noqa: E402
from fastdiff.tokens.linfusion import LinFusion  # noqa: E402
from fastdiff.tokens.linfusion_format import LinearLayer, places, write  # noqa: E402
from fastdiff.tokens.query_skip import QuerySkip  # noqa: E402
from fastdiff.tokens.rank import parted, rows, stand_ins  # noqa: E402
from fastdiff.tokens.tome import ToMe  # noqa: E402
from fastdiff.tokens.zero_tprune import ZeroTPrune  # noqa: E402

STEPS = 50
STOCK = "stock"


def sdxl(tiny: bool) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4,
        block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1 if tiny else 2, transformer_layers_per_block=(1, 2, 3 if tiny else 10),
        attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
        cross_attention_dim=64 if tiny else 2048, norm_num_groups=8 if tiny else 32,
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8 if tiny else 256,
        projection_class_embeddings_input_dim=80 if tiny else 2816,
    )


def materialised(dtype: torch.dtype, device: str, tiny: bool) -> nn.Module:
    with torch.device("meta"):
        model = sdxl(tiny)
    model = nn.Module.to(model, dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    return model


def inputs_of(edge: int, dtype: torch.dtype, device: str, tiny: bool) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    cells = edge // 8
    return {
        "sample": randn(2, 4, cells, cells), "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": randn(2, 77, 64 if tiny else 2048),
        "added_cond_kwargs": {"text_embeds": randn(2, 32 if tiny else 1280),
                              "time_ids": randn(2, 6)},
    }


def linfusion_weights(model: nn.Module, folder: Path) -> None:
    """Random weights of the published shapes for SDXL: added projections of a sixteenth."""
    layers = {}
    for place in places(model):
        place = place._replace(hidden=max(4, place.width // 16))
        with torch.device("meta"):
            layer = LinearLayer(place)
        layer = layer.to(torch.float16).to_empty(device="cpu")
        for parameter in layer.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        layers[place] = layer
    write(folder, layers)


def variants(folder: Path, few: bool) -> dict[str, tuple[Method, ...]]:
    off: dict[str, Any] = {"guard": False}
    keys = KVDownsample(min_tokens=0, **off)
    found: dict[str, tuple[Method, ...]] = {
        STOCK: (),
        "at-edm": (AtEdm(**off),),
        "kv-downsample": (keys,),
        "at-edm + kv-downsample": (AtEdm(**off), keys),
        "at-edm, guarded": (AtEdm(layout="all"),),
        "at-edm, all blocks": (AtEdm(layout="all", **off),),
        "at-edm, 5 iterations": (AtEdm(iterations=5, **off),),
        "at-edm, increment": (AtEdm(recover="increment", **off),),
        "zero-tprune": (ZeroTPrune(**off),),
        "kv-downsample, guarded": (KVDownsample(min_tokens=0),),
        "tome 0.5": (ToMe(),),
        "linfusion": (LinFusion(weights=str(folder)),),
    }
    return {name: methods for i, (name, methods) in enumerate(found.items()) if not few or i < 4}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def enabled(model: nn.Module, methods: tuple[Method, ...], middle: int = STEPS // 2) -> Any:
    """The model with these methods, in the middle of a run."""
    fastdiff.disable(model)
    if not methods:
        return None
    handle = fastdiff.enable(model, *methods, strict=True)
    handle.clock.begin(STEPS)
    for _ in range(middle):
        handle.clock.advance()
    return handle


@torch.no_grad()
def in_turn(
    model: nn.Module, inputs: dict[str, Any], chosen: dict[str, tuple[Method, ...]], repeats: int,
    device: str, until: float, middle: int = STEPS // 2,
) -> list[dict[str, Any]]:
    """Every variant once to warm up, then in turn; rows of medians against stock."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    facts: dict[str, dict[str, Any]] = {}
    stock = None
    for repeat in range(-2, repeats):
        if repeat >= 3 and time.perf_counter() > until:
            break
        for name, methods in chosen.items():
            handle = enabled(model, methods, middle)
            if any(isinstance(method, QuerySkip) for method in methods):
                # the refresh before: it notes the sizes of the outputs
                model(**inputs, return_dict=False)
                assert handle is not None
                handle.clock.advance()
            synchronize(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            out = model(**inputs, return_dict=False)[0]
            synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - begin)
            elif repeat == -1:
                stock = out if stock is None else stock
                facts[name] = {
                    "relative_error": float((out - stock).float().norm() / stock.float().norm()),
                    "told": {} if handle is None else handle.report.summary()["methods"],
                    "density": 1.0 if handle is None else handle.report.summary()["density"],
                    "peak_memory_gib": None if device != "cuda" else round(
                        torch.cuda.max_memory_allocated() / 2**30, 3),
                }
    fastdiff.disable(model)
    against = next(iter(seconds))
    base, found = record.spread(seconds[against])["seconds"], []
    for name, times in seconds.items():
        spread = record.spread(times)
        found.append({"variant": name, "against": against, **spread,
                      "speedup": base / spread["seconds"], **facts[name]})
        print(f"  {name:<26} {spread['seconds'] * 1e3:9.2f} ms ({spread['p20'] * 1e3:.2f} to "
              f"{spread['p80'] * 1e3:.2f})  {base / spread['seconds']:5.2f}x", flush=True)
    return found


@torch.no_grad()
def compiled(
    dtype: torch.dtype, edge: int, chosen: dict[str, tuple[Method, ...]], repeats: int,
    device: str, tiny: bool,
) -> list[dict[str, Any]]:
    """Each variant on a model of its own, compiled whole, then all in turn."""
    models, seconds, first = {}, {name: [] for name in chosen}, {}
    inputs = inputs_of(edge, dtype, device, tiny)
    for name, methods in chosen.items():
        model = materialised(dtype, device, tiny)
        enabled(model, methods)
        models[name] = torch.compile(model, fullgraph=True, backend="eager" if tiny else "inductor")
        begin = time.perf_counter()
        for _ in range(2):
            models[name](**inputs, return_dict=False)
        synchronize(device)
        first[name] = time.perf_counter() - begin
        print(f"  {name} compiled in {first[name]:.0f} s", flush=True)
    for _ in range(repeats):
        for name, model in models.items():
            begin = time.perf_counter()
            model(**inputs, return_dict=False)
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    base, found = record.spread(seconds[STOCK])["seconds"], []
    for name, times in seconds.items():
        spread = record.spread(times)
        found.append({"variant": name, "against": STOCK, **spread,
                      "speedup": base / spread["seconds"], "compile_seconds": first[name]})
        print(f"  {name:<26} {spread['seconds'] * 1e3:9.2f} ms  "
              f"{base / spread['seconds']:5.2f}x compiled", flush=True)
    return found


@torch.no_grad()
def overhead(edge: int, dtype: torch.dtype, device: str, tiny: bool) -> list[dict[str, Any]]:
    """Where the extra time of at-edm goes, for one block of each level and for all its blocks."""
    cells, found = edge // 8, []
    levels = [("all blocks", 2, 64 if tiny else 640, 4 if tiny else 10, 5),
              ("dagger", 4, 64 if tiny else 1280, 4 if tiny else 20, 6)]
    for layout, shrink, width, heads, blocks in levels:
        tokens = (cells // shrink) ** 2
        count = round(0.37 * tokens / 8) * 8
        q, k = (torch.randn(2, tokens, heads, width // heads, device=device).to(dtype)
                for _ in range(2))
        states = torch.randn(2, tokens, width, device=device).to(dtype)
        lse = row_lse(q, k)
        score = column_mass(q, k, lse)
        kept, dropped = parted(score.exp().mean(1), count)
        place = stand_ins(q, k, kept, None, dropped)
        fewer = rows(states, kept)
        parts: dict[str, Callable[[], Any]] = {
            "rank: softmax denominators": lambda q=q, k=k: row_lse(q, k),
            "rank: column mass": lambda q=q, k=k, lse=lse: column_mass(q, k, lse),
            "rank: order": lambda score=score, count=count: parted(score.exp().mean(1), count),
            "rank: stand-ins": lambda q=q, k=k, kept=kept, dropped=dropped: stand_ins(
                q, k, kept, None, dropped),
            "rank: all of it": lambda q=q, k=k, n=count: rank_by_attention(q, k, None, n, 1, 1),
            "gather": lambda states=states, kept=kept: rows(states, kept),
            "recover": lambda fewer=fewer, place=place: rows(fewer, place),
        }
        for part, run in parts.items():
            times = []
            for turn in range(-3, 5 if tiny else 20):
                synchronize(device)
                begin = time.perf_counter()
                run()
                synchronize(device)
                if turn >= 0:
                    times.append(time.perf_counter() - begin)
            found.append({"layout": layout, "part": part, "tokens": tokens, "kept": count,
                          "blocks": blocks, **record.spread(times)})
    for row in found:
        print(f"  {row['layout']:<11} {row['tokens']:>6} tokens  {row['part']:<28} "
              f"{row['seconds'] * 1e6:9.1f} us a block", flush=True)
    return found


def skipping(repeats: int, device: str, tiny: bool, until: float) -> list[dict[str, Any]]:
    """Query-skip over block-sparse attention on a Wan-1.3B-size transformer; 5 of its layers."""
    architecture = ARCHITECTURES["wan-1.3b-480p"]
    layers = 2 if tiny else 5
    model, inputs = materialise(architecture, layers, device, tiny)
    less: dict[str, Any] = {"min_tokens": 1} if tiny else {}
    chosen: dict[str, tuple[Method, ...]] = {}
    for density in (0.25, 0.1):
        sparse = fastdiff.TileSparse(density=density, **less)
        chosen[f"tile-sparse {density}"] = (sparse,)
        chosen[f"tile-sparse {density} + query-skip 0.5"] = (sparse, QuerySkip(**less))
    chosen["stock"] = ()
    chosen["query-skip 0.5"] = (QuerySkip(**less),)
    print(f"{architecture.title}; {layers} of {architecture.layers[1]} layers", flush=True)
    # step 9 is the last dense step and a refresh, 13 a refresh, 14 skips
    found = in_turn(model, inputs, chosen, repeats, device, until, middle=13)
    return [{"model": "wan-1.3b-480p", "layers": layers, "of_layers": architecture.layers[1],
             "dtype": str(inputs["hidden_states"].dtype), **row} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--dtypes", nargs="*", default=["float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=170, help="no new round after these")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.edges, args.dtypes, args.repeats = [256], ["float32"], 3
    begin = time.perf_counter()
    plans = [(edge, dtype) for dtype in args.dtypes for edge in args.edges]
    share = args.seconds / (len(plans) + 1)
    result: list[dict[str, Any]] = []
    split: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (edge, name) in enumerate(plans):
            dtype = getattr(torch, name)
            about = {"model": "sdxl", "edge": edge, "dtype": str(dtype), "batch": 2,
                     "compiled": args.compile, "tiny": args.tiny}
            print(f"SDXL UNet, {edge} x {edge}, {name}", flush=True)
            if args.compile:
                few = variants(Path(folder), few=True)
                rows_found = compiled(dtype, edge, few, args.repeats, device, args.tiny)
            else:
                model = materialised(dtype, device, args.tiny)
                if not (Path(folder) / "config.json").exists():
                    linfusion_weights(model, Path(folder))
                inputs = inputs_of(edge, dtype, device, args.tiny)
                rows_found = in_turn(model, inputs, variants(Path(folder), few=False),
                                     args.repeats, device, begin + share * (number + 1))
                split += [{**about, **row} for row in overhead(edge, dtype, device, args.tiny)]
                del model
            result += [{**about, **row} for row in rows_found]
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    if not args.compile:
        result += [{"tiny": args.tiny, **row} for row in
                   skipping(args.repeats, device, args.tiny, begin + args.seconds)]
    suffix = ("_compiled" if args.compile else "") + ("_tiny" if args.tiny else "")
    settings = {"repeats": args.repeats, "edges": args.edges, "dtypes": args.dtypes,
                "overhead": split}
    path = args.output / f"tokens_{device}{suffix}.json"
    record.write(path, "tokens", device, settings, result)
    print(f"{path}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
