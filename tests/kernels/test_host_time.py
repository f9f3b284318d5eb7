"""Host time of the Hopper kernel, counted in calls: a repeated call makes nothing anew."""

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from fastdiff.kernels import block_sparse_attention as operation
from fastdiff.kernels import hopper
from fastdiff.kernels.block_sparse_attention import block_sparse_attention, gluon_impl

TOKENS, HEADS, BLOCKS = 640, 4, 5
# calls of Python and C functions for one call of the op, with little to spare; three ask on which
# device it runs
MOST = {False: 84, True: 114}


class Launched:
    """Stands for a kernel: compiles to itself, keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names
        self.launches: list[tuple[str, list[torch.Tensor], tuple]] = []

    def __getitem__(self, grid: tuple) -> "Launched":
        self.grid = grid
        return self

    def __call__(self, *args: Any, **settings: Any) -> "Launched":
        mapped = [x.base for x in args[:6] if x is not None]
        self.launches.append(("slow" if settings else "ready", mapped, args))
        return self


@pytest.fixture
def kernels(monkeypatch) -> Iterator[list[Launched]]:
    """Every plan's kernel; a CPU passes for a Hopper GPU."""
    found: list[Launched] = []
    make = gluon_impl._plan

    def plan(*args: Any, **options: Any) -> hopper.Plan:
        made = make(*args, **options)
        made.kernel = Launched(made.kernel)
        found.append(made.kernel)
        return made

    monkeypatch.setattr(gluon_impl, "_plan", plan)
    monkeypatch.setattr(gluon_impl, "not_supported_reasons", lambda *args: [])
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(hopper, "_counters", lambda device: iter([torch.zeros(4)] * 99))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    # what a CPU tensor gives for its own
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(operation, "_chosen", {})
    hopper._made.plans.clear()
    yield found
    hopper._made.plans.clear()


def arguments(tail: bool, ordered: bool = False) -> dict[str, Any]:
    q, k, v = (torch.empty(1, TOKENS, HEADS, 64, dtype=torch.float16) for _ in range(3))
    offsets = torch.arange(0, TOKENS + 1, 128, dtype=torch.int32)
    indices = torch.zeros(1, HEADS, BLOCKS, BLOCKS, dtype=torch.int32)
    order = torch.arange(HEADS * BLOCKS, dtype=torch.int32)
    mean = torch.empty(1, HEADS, BLOCKS, 64, dtype=torch.float16)
    pooled = (mean, mean.clone(), torch.ones(1, BLOCKS), indices.bool())
    return {"query": q, "key": k, "value": v, "indices": indices,
            "counts": indices[..., 0].contiguous(), "query_offsets": offsets,
            "key_offsets": offsets, "block_q": 128, "block_k": 128,
            "tail": pooled if tail else None, "order": order if ordered else None,
            "impl": "gluon"}


def calls(run: Any) -> int:
    count = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    # what a collection finalises is no call of ours
    gc.disable()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_a_repeated_call_makes_nothing_anew(kernels, tail, ordered):
    args = arguments(tail, ordered)
    block_sparse_attention(**args)
    # other tensors of the same shapes
    again = arguments(tail, ordered)
    assert calls(lambda: block_sparse_attention(**again)) <= MOST[tail] + 5 * ordered
    (kernel,) = kernels
    assert [how for how, _, _ in kernel.launches] == ["slow", "ready"]
    _, mapped, _ = kernel.launches[1]
    wanted = [again["query"], again["key"], again["value"], mapped[3], *(again["tail"] or ())[:2]]
    assert [x.data_ptr() for x in mapped] == [x.data_ptr() for x in wanted]
    # what the short way passes is what triton would have
    names = kernel.arg_names
    passed = dict(zip(names, kernel.launches[1][2], strict=True))
    assert passed["USE_ORDER"] == ordered
    assert passed["order"].data_ptr() == again["order" if ordered else "query_offsets"].data_ptr()
    # no tensor lives longer for having been a call's
    assert all(x is None or x.base is None for x in hopper._made.plans.popitem()[1].maps)


def test_other_shapes_and_alignments_are_looked_at(kernels):
    args = arguments(False)
    block_sparse_attention(**args)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        odd = torch.empty(TOKENS * HEADS * 64 + 1, dtype=torch.float16)[1:]
        block_sparse_attention(**{**args, "query": odd.view_as(args["query"])})
    with pytest.raises(ValueError, match="counts must be"):
        block_sparse_attention(**{**args, "counts": args["counts"].long()})
    shifted = torch.empty(TOKENS * 2, dtype=torch.int32)[1 : len(args["query_offsets"]) + 1]
    block_sparse_attention(**{**args, "query_offsets": shifted})
    # pointers that are not multiples of 16 go the way that looks at them
    assert [how for how, _, _ in kernels[0].launches] == ["slow", "slow"]
    block_sparse_attention(**{**args, "query": args["query"][:, :512],
                              "query_offsets": args["query_offsets"][:5],
                              "counts": args["counts"][..., :4].contiguous(),
                              "indices": args["indices"][:, :, :4].contiguous()})
    assert len(kernels) == 2
    block_sparse_attention(**{**args, "order": arguments(False, True)["order"]})
    assert len(kernels) == 3
    with pytest.raises(ValueError, match=r"order must be contiguous int32 \[20\]"):
        block_sparse_attention(**{**args, "order": torch.arange(20)})


def test_a_look_at_the_device_calls_the_kernel_as_it_is(kernels):
    """Nothing is computed here, and nothing but that may be told of it."""
    told = gluon_impl.broken.__wrapped__(torch.device("cpu"))
    assert told is not None and told.startswith("wrong result")
    assert [kernel.launches for kernel in kernels]
