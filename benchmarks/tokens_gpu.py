"""Token methods on the full-size SDXL UNet with random weights against SDPA; query-skip on Wan.

python benchmarks/tokens_gpu.py            # 1024 and 2048, fp16 and bf16; 3 minutes on an H200
python benchmarks/tokens_gpu.py --graph    # each forward in a CUDA graph: the GPU without the host
python benchmarks/tokens_gpu.py --compile  # transformer layers compiled, fewer variants
python benchmarks/tokens_gpu.py --compile --graph  # both
python benchmarks/tokens_gpu.py --sweep    # settings of the ranking kernels
python benchmarks/tokens_gpu.py --tiny     # a smoke run on a CPU, with any of the above

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
from token_models import (  # noqa: E402
    STEPS,
    enabled,
    inputs_of,
    linfusion_weights,
    materialised,
    variants,
)
from token_modes import graphed, modes, rows_of, seconds_of  # noqa: E402
from token_sweep import sweep  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.kernels.column_mass import column_mass, row_lse  # noqa: E402
from fastdiff.method import Method  # noqa: E402
from fastdiff.tokens.at_edm import rank_by_attention  # noqa: E402
from fastdiff.tokens.query_skip import QuerySkip  # noqa: E402
from fastdiff.tokens.rank import parted, rows, stand_ins  # noqa: E402


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
    return rows_of(seconds, facts)


def launches(run: Callable[[], Any], device: str) -> int | None:
    """Kernels that one call launches, as the profiler counts them; None where it sees none."""
    if device != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    found = [event for event in profile.events()
             if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(found) or None


@torch.no_grad()
def overhead(
    edge: int, dtype: torch.dtype, device: str, tiny: bool, graph: bool
) -> list[dict[str, Any]]:
    """Where the extra time of at-edm goes, for one block of each level.

    One call at a time with the host waiting, or its graph replayed many times.
    """
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
            "rank: all of it": lambda q=q, k=k, n=count: rank_by_attention(
                q, k, None, n, 1, 1, "keys"),
            "gather": lambda states=states, kept=kept: rows(states, kept),
            "recover": lambda fewer=fewer, place=place: rows(fewer, place),
        }
        for part, run in parts.items():
            times = []
            if graph:
                replay, _ = graphed(run, lambda: None, device)
                times = [seconds_of(replay, device, 20) for _ in range(5 if tiny else 20)]
            for turn in range(0 if graph else -3, 0 if graph else 5 if tiny else 20):
                synchronize(device)
                begin = time.perf_counter()
                run()
                synchronize(device)
                if turn >= 0:
                    times.append(time.perf_counter() - begin)
            found.append({"layout": layout, "part": part, "tokens": tokens, "kept": count,
                          "blocks": blocks, "launches": launches(run, device),
                          **record.spread(times)})
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
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.edges, args.dtypes, args.repeats = [256], ["float32"], 3
    tiny = "_tiny" if args.tiny else ""
    if args.sweep:
        path = args.output / f"tokens_sweep_{device}{tiny}.json"
        sweep(3 if args.tiny else 7, device, args.tiny,
              lambda rows: record.write(path, "tokens sweep", device, {}, rows))
        print(path)
        return
    suffix = ("_compiled" if args.compile else "") + ("_graph" if args.graph else "") + tiny
    path = args.output / f"tokens_{device}{suffix}.json"
    Sizes(args, device, path).run()
    print(path)


class Sizes:
    """All sizes and dtypes, one after the other, and what has been found so far."""

    def __init__(self, args: argparse.Namespace, device: str, path: Path) -> None:
        self.args, self.device, self.path = args, device, path
        self.begin = time.perf_counter()
        self.result: list[dict[str, Any]] = []
        self.split: list[dict[str, Any]] = []
        self.left_out: dict[str, dict[str, str]] = {}

    def run(self) -> None:
        args = self.args
        plans = [(edge, dtype) for dtype in args.dtypes for edge in args.edges]
        plain = not args.compile and not args.graph
        share = args.seconds / (len(plans) + plain)
        with tempfile.TemporaryDirectory() as folder:
            for number, (edge, name) in enumerate(plans):
                print(f"SDXL UNet, {edge} x {edge}, {name}, after {self.spent():.0f} s", flush=True)
                self.one(edge, name, Path(folder), self.begin + share * (number + 1))
                self.save()
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()
        if plain:
            self.result += [{"tiny": args.tiny, **row} for row in
                            skipping(args.repeats, self.device, args.tiny,
                                     self.begin + args.seconds)]
            self.save()

    def one(self, edge: int, name: str, folder: Path, until: float) -> None:
        """One size and dtype; variants go on in turn until `until`."""
        args, device, dtype = self.args, self.device, getattr(torch, name)
        about = {"model": "sdxl", "edge": edge, "dtype": str(dtype), "batch": 2,
                 "compiled": args.compile, "graph": args.graph, "tiny": args.tiny}
        with torch.no_grad():
            model = materialised(dtype, device, args.tiny)
            if not (folder / "config.json").exists():
                linfusion_weights(model, folder)
        chosen = variants(folder, few=args.compile)
        if args.compile or args.graph:
            del model
            found, self.left_out[f"{edge} px, {name}"] = modes(
                edge, dtype, chosen, args.repeats, device, args.tiny, until, args.compile,
                args.graph)
        else:
            found = in_turn(model, inputs_of(edge, dtype, device, args.tiny), chosen,
                            args.repeats, device, until)
        print(f"  forwards timed after {self.spent():.0f} s", flush=True)
        self.result += [{**about, **row} for row in found]
        if not args.compile:
            self.split += [{**about, **row} for row in
                           overhead(edge, dtype, device, args.tiny, args.graph)]
            print(f"  parts timed after {self.spent():.0f} s", flush=True)

    def spent(self) -> float:
        return time.perf_counter() - self.begin

    def save(self) -> None:
        settings = {"repeats": self.args.repeats, "edges": self.args.edges,
                    "dtypes": self.args.dtypes, "overhead": self.split,
                    "not_captured": self.left_out}
        record.write(self.path, "tokens", self.device, settings, self.result)


if __name__ == "__main__":
    main()
