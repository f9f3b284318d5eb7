"""One denoiser forward of full-size architectures: every attention method against the best dense.

python benchmarks/architectures.py                          # all, about four minutes on an H200
python benchmarks/architectures.py --models flux-2k --methods tile-sparse vmoba --density 0.1
python benchmarks/architectures.py --tiny                   # a smoke run on small shapes

All variants run in turn, round after round. Weights are random, so `relative_error` compares
methods on almost even attention only; see benchmarks/methods.py for quality.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import knobs  # noqa: E402
import record  # noqa: E402
from denoisers import ARCHITECTURES, materialise  # noqa: E402
from dense_kernels import dense_kernel, kernels  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.policies import Policy  # noqa: E402

# a run of so many steps, of which the one in the middle is timed
STEPS = 50
SEAM = "dense through the seam"


class Variant:
    """One row: stock on a dense kernel, or a method; times, peak memory, output."""

    def __init__(self, name: str, policy: Policy | None, kernel: str | None = None) -> None:
        self.name, self.policy, self.kernel = name, policy, kernel
        self.seconds: list[float] = []
        self.facts: dict[str, Any] = {}
        self.failed: str | None = None

    def run(self, model: Any, inputs: dict[str, Any], kernel: str | None, device: str) -> tuple:
        fastdiff.disable(model)
        handle = None
        if self.policy is not None:
            handle = fastdiff.enable(model, self.policy, strict=True)
            handle.clock.begin(STEPS)
            handle.clock.step = STEPS // 2
            if self.policy.reuse > 1:
                # the step before made the masks
                model(**inputs, return_dict=False)
                handle.clock.step += 1
                handle.report.reset()
        _synchronize(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # in compiled code the dense kernel is torch's own choice
        with dense_kernel(self.kernel or kernel) if kernel else contextlib.nullcontext():
            begin = time.perf_counter()
            out = model(**inputs, return_dict=False)[0]
            _synchronize(device)
            seconds = time.perf_counter() - begin
        return out, seconds, handle

    def learn(self, out: Any, handle: Any, stock: Any, device: str) -> None:
        """What one untimed run tells."""
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        wide = stock.float()
        self.facts = {
            "relative_error": float((out.float() - wide).norm() / wide.norm()),
            "peak_memory_gib": None if peak is None else round(peak, 3),
            "density": 1.0, "density_all_steps": 1.0,
        }
        if handle is not None:
            self._learn_report(handle)

    def _learn_report(self, handle: Any) -> None:
        total, rows = handle.report.summary(), handle.report.rows()
        policy = self.policy
        assert policy is not None
        dense = policy._dense_steps(STEPS) / STEPS
        self.facts |= {
            "density": knobs.realised(total), "operations": total["density_all_calls"],
            "density_all_steps": dense + (1 - dense) * knobs.realised(total),
            "dense_steps": dense, "sparse_calls": total["sparse_calls"],
            "dense_calls": total["dense_calls"],
            "implementation": next((r["implementation"] for r in rows if r["implementation"]), ""),
            "options": {k: v for k, v in policy.to_dict().items()
                        if v is not None and not isinstance(v, dict)},
        }

    def time_layers(self, handle: Any) -> None:
        if handle is not None:
            each = [row["seconds"] for row in handle.report.rows()]
            self.facts.setdefault("_layers", []).append(each)

    def layers(self) -> list[float] | None:
        """Median seconds of the attention op in each layer, selection included."""
        found = self.facts.pop("_layers", None)
        if not found:
            return None
        return [record.spread(list(each))["seconds"] for each in zip(*found, strict=True)]


def variants(
    methods: list[str], density: float, device: str, tile_options: dict, compiled: bool
) -> list[Variant]:
    names = ["default"] if compiled else kernels(device)
    found = [Variant(f"dense {name}", None, name) for name in names]
    seam = knobs.method(knobs.OURS, 1.0, max_density=0.5, dense_steps=0)
    return [*found, Variant(SEAM, seam),
            *(Variant(name, knobs.method(name, density, **tile_options)) for name in methods)]


@torch.no_grad()
def measure(name: str, args: argparse.Namespace, device: str, until: float) -> list[dict]:
    architecture = ARCHITECTURES[name]
    layers = args.layers or (2 if args.tiny else architecture.layers[0])
    begin = time.perf_counter()
    model, inputs = materialise(architecture, layers, device, args.tiny)
    print(f"{name}: {architecture.title}; {layers} of {architecture.layers[1]} layers, ready after "
          f"{time.perf_counter() - begin:.1f} s", flush=True)
    rows = variants(args.methods, args.density, device, args.options, args.compile)
    stock, kernel = None, None if args.compile else "default"
    if args.compile:
        # a method is another graph of a layer
        torch._dynamo.config.recompile_limit = 64
        model.compile_repeated_blocks(dynamic=False)
    for variant in rows:
        # twice: the first run compiles
        with _failing(variant):
            variant.run(model, inputs, kernel, device)
            out, seconds, handle = variant.run(model, inputs, kernel, device)
            stock = out if stock is None else stock
            variant.learn(out, handle, stock, device)
            variant.facts["first"] = seconds
        if variant.name == SEAM and not args.compile:
            kernel = _best(rows)
        _tidy(device)
    rounds = 0
    while rounds < args.repeats and (rounds < 2 or time.perf_counter() < until):
        for variant in rows:
            if variant.failed is None:
                with _failing(variant):
                    _, seconds, handle = variant.run(model, inputs, kernel, device)
                    variant.seconds.append(seconds)
                    variant.time_layers(handle)
        rounds += 1
    fastdiff.disable(model)
    return _rows(name, args, rows, layers, inputs)


def _best(rows: list[Variant]) -> str:
    dense = [row for row in rows if row.kernel and row.failed is None]
    best = min(dense, key=lambda row: row.facts["first"])
    return best.kernel or "default"


def _rows(
    name: str, args: argparse.Namespace, rows: list[Variant], layers: int, inputs: dict
) -> list[dict]:
    dense = {row.name: record.spread(row.seconds)["seconds"] for row in rows
             if row.kernel and row.seconds}
    base = min(dense.values())
    found = []
    for row in rows:
        about = {"model": name, "title": ARCHITECTURES[name].title, "layers": layers,
                 "of_layers": ARCHITECTURES[name].layers[1], "tiny": args.tiny,
                 "dtype": str(inputs["hidden_states"].dtype),
                 "shape": list(inputs["hidden_states"].shape), "variant": row.name}
        if row.failed is not None or not row.seconds:
            found.append({**about, "failed": row.failed or "not run"})
            print(f"  {row.name:<24} failed: {row.failed}", flush=True)
            continue
        spread, each = record.spread(row.seconds), row.layers()
        row.facts.pop("first", None)
        found.append({**about, **spread, "speedup": base / spread["seconds"],
                      "best_dense": min(dense, key=lambda kernel: dense[kernel]),
                      "layer_seconds": each, **row.facts})
        op = "" if not each else f"{sum(each) / len(each) * 1e3:8.2f} ms a layer's attention"
        print(f"  {row.name:<24} {spread['seconds'] * 1e3:9.1f} ms ({spread['p20'] * 1e3:.1f} to "
              f"{spread['p80'] * 1e3:.1f})  {base / spread['seconds']:5.2f}x  density "
              f"{row.facts['density']:.3f}  {op}", flush=True)
    return found


@contextlib.contextmanager
def _failing(variant: Variant) -> Iterator[None]:
    """A method that cannot run here is a row that says why; the others go on."""
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError, ImportError, AssertionError,
            TypeError) as error:
        variant.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _tidy(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _kept(path: Path, device: str, models: list[str], density: float) -> list[dict]:
    """Rows of an earlier run on this machine that this run does not replace."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    same = before["device"] == record.machine(device) and before["versions"] == record.versions()
    return [row for row in before["rows"] if same and not (
        row["model"] in models and row.get("asked_density") == density)]


def main(words: list[str] | None = None, tell: Callable[[str], None] = print) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(ARCHITECTURES),
                        choices=list(ARCHITECTURES))
    parser.add_argument("--methods", nargs="*", help="default: every registered attention method")
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="a knob for every method, such as dense_steps=0.1")
    parser.add_argument("--layers", type=int, help="layers to build; the result states them")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=220.0,
                        help="rounds stop when this time is used up; two are always run")
    parser.add_argument("--compile", action="store_true",
                        help="the model's layers compiled, stock and sparse alike")
    parser.add_argument("--tiny", action="store_true", help="small shapes, two layers, two rounds")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.methods = knobs.names(args.methods)
    args.options = {k: json.loads(v) for k, v in (o.split("=", 1) for o in args.option)}
    if args.tiny:
        args.repeats = min(args.repeats, 2)
    suffix = ("_compiled" if args.compile else "") + ("_tiny" if args.tiny else "")
    path = args.output or record.RESULTS / f"architectures_{device}{suffix}.json"
    rows = _kept(path, device, args.models, args.density)
    begin = time.perf_counter()
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    for number, name in enumerate(args.models, 1):
        until = begin + args.seconds * number / len(args.models)
        found = measure(name, args, device, until)
        rows += [{**row, "asked_density": args.density} for row in found]
        record.write(path, "architectures", device, settings, rows)
        _tidy(device)
    tell(str(path))
    return path


if __name__ == "__main__":
    main()
