"""The forward of each token method made ready once, then timed in turn: compiled, or as a graph."""

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from timing import timed
from token_models import STOCK, enabled, inputs_of, materialised
from torch import Tensor

from fastdiff.method import Method

Run = Callable[[], Any]


def graphed(run: Run, ready: Run, device: str, pool: Any = None) -> tuple[Run, Any]:
    """`run` captured into a CUDA graph, as a function that replays it, and what the replay writes.

    ready: puts everything into the state that `run` starts from; called before each of its calls.
    pool: memory that graphs share; a replay then destroys the results of the others. On a CPU
    there are no graphs and `run` itself comes back, for smoke runs.
    """
    ready()
    if device != "cuda":
        def again() -> Any:
            ready()
            return run()

        return again, again()
    aside = _aside()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
        ready()
        # what waits for the GPU cannot be captured: found out here, a failed capture leaves a mess
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ready()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, out


@functools.cache
def _aside() -> Any:
    """One stream for all warming up: the allocator keeps memory for each that it has seen."""
    return torch.cuda.Stream()


def seconds_of(run: Run, device: str, calls: int = 1) -> float:
    """Seconds of a call. On a GPU between events, behind one call that keeps it from waiting."""
    if device == "cuda":
        run()
    return timed(run, calls, device)


@torch.no_grad()
def in_graphs(
    chosen: dict[str, tuple[Method, ...]], call: Callable[[Any], Tensor],
    ready: Callable[[str, tuple[Method, ...]], Any], repeats: int, device: str, until: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of every variant captured once and replayed in turn, and why others were not captured.

    ready(name, methods): the model with the methods, in the state of the wanted step; call(model):
    one forward. The first variant is what the others are compared with.
    """
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    runs, facts, left_out, base = {}, {}, {}, None
    for name, methods in chosen.items():
        begin, model = time.perf_counter(), {}
        try:
            run, out = graphed(lambda model=model: call(model["it"]),
                               lambda n=name, m=methods, model=model: model.update(it=ready(n, m)),
                               device, pool)
        except (RuntimeError, ValueError) as error:
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if device == "cuda":
                # a capture that broke off still holds the pool and the random numbers
                pool = torch.cuda.graph_pool_handle()
                torch.cuda.default_generators[0].graphsafe_set_state(
                    torch.Generator(device).graphsafe_get_state())
            print(f"  {name}: not captured: {left_out[name]}", flush=True)
            continue
        found = out.float().clone()
        base = found if base is None else base
        runs[name] = run
        facts[name] = {"relative_error": float((found - base).norm() / base.norm()),
                       "ready_seconds": time.perf_counter() - begin}
        print(f"  {name} captured, {facts[name]['ready_seconds']:.1f} s", flush=True)
    return timed_in_turn(runs, facts, repeats, device, until), left_out


def timed_in_turn(
    runs: dict[str, Run], facts: dict[str, dict[str, Any]], repeats: int, device: str, until: float,
) -> list[dict[str, Any]]:
    """Rows of medians against the first; after `until` no new round, but three in any case."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls = {name: max(1, min(20, round(0.1 / seconds_of(run, device))))
             for name, run in runs.items()}
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() > until:
            break
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device, calls[name]))
    return rows_of(seconds, facts)


def rows_of(
    seconds: dict[str, list[float]], facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Medians against the first variant."""
    against = next(iter(seconds))
    base, found = record.spread(seconds[against])["seconds"], []
    for name, times in seconds.items():
        spread = record.spread(times)
        found.append({"variant": name, "against": against, **spread,
                      "speedup": base / spread["seconds"], **facts[name]})
        print(f"  {name:<26} {spread['seconds'] * 1e3:9.2f} ms ({spread['p20'] * 1e3:.2f} to "
              f"{spread['p80'] * 1e3:.2f})  {base / spread['seconds']:5.2f}x  error "
              f"{facts[name]['relative_error']:.3f}", flush=True)
    return found


def compiled(name: str, methods: tuple[Method, ...], inputs: dict[str, Any], dtype: torch.dtype,
             device: str, tiny: bool) -> Any:
    """A model of its own with these methods, its transformer layers compiled, and called once."""
    # variants share the code of a layer, and all their graphs count against one limit
    torch._dynamo.config.recompile_limit = 64
    begin = time.perf_counter()
    model = materialised(dtype, device, tiny)
    enabled(model, methods)
    # sizes do not change here
    model.compile_repeated_blocks(fullgraph=True, dynamic=False,
                                  backend="eager" if tiny else "inductor")
    model(**inputs, return_dict=False)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"  {name} compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    return model


@torch.no_grad()
def modes(
    edge: int, dtype: torch.dtype, chosen: dict[str, tuple[Method, ...]], repeats: int,
    device: str, tiny: bool, until: float, compile_layers: bool, graph: bool,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One forward of SDXL's UNet with each of the methods: layers compiled, captured, or both."""
    inputs = inputs_of(edge, dtype, device, tiny)
    made: dict[str, Any] = {}
    # a graph reads weights and tables of its method after the method has left
    kept: list[Any] = []

    def ready(name: str, methods: tuple[Method, ...]) -> Any:
        if compile_layers:
            if name not in made:
                made[name] = compiled(name, methods, inputs, dtype, device, tiny)
            return made[name]
        if STOCK not in made:
            made[STOCK] = materialised(dtype, device, tiny)
        kept.append((enabled(made[STOCK], methods), [*made[STOCK].parameters()]))
        return made[STOCK]

    def call(model: Any) -> Tensor:
        return model(**inputs, return_dict=False)[0]

    try:
        if graph:
            return in_graphs(chosen, call, ready, repeats, device, until)
        runs, facts, base = {}, {}, None
        for name, methods in chosen.items():
            model = ready(name, methods)
            runs[name] = lambda model=model: call(model)
            found = runs[name]().float()
            base = found if base is None else base
            facts[name] = {"relative_error": float((found - base).norm() / base.norm())}
        return timed_in_turn(runs, facts, repeats, device, until), {}
    finally:
        made.clear()
        gc.collect()
