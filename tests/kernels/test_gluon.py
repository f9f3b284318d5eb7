"""The Hopper kernel on a Hopper GPU, against float64."""

import itertools

import pytest
import torch
from attention_cases import DTYPES, Case, check

from fastdiff.kernels.block_sparse_attention import implementations, probe

GPU = torch.cuda.is_available()

pytestmark = pytest.mark.skipif(
    not GPU or bool(implementations("cuda", torch.float16, 64)["gluon"]), reason="no Hopper GPU")


@pytest.mark.parametrize("case", [
    Case(2, 4, 2, 517, 900, dim, block_q, block_k, dtype, ragged, masked, tail, seed=dim)
    for dim, masked in ((64, False), (64, True), (80, True), (128, False), (128, True))
    for dtype in DTYPES[1:] for ragged in (False, True) for tail in (False, True)
    for block_q, block_k in ((128, 128), (128, 32), (97, 117))
], ids=repr)
def test_gluon(case):
    check(case.build("cuda"), "gluon")


@pytest.mark.parametrize("case", [
    Case(2, heads, 1, 517, keys, 128, 128, block_k, DTYPES[1], ragged, masked, tail, seed=block_k)
    for block_k in (64, 32, 16) for heads, keys in ((4, 1024), (3, 900))
    for ragged, masked, tail in ((False, False, False), (True, False, True), (False, True, True))
], ids=repr)
def test_tiles_of_several_blocks(case):
    check(case.build("cuda"), "gluon")


@pytest.mark.parametrize("where", ["text", "a block", "all"])
def test_masked_keys_in_few_blocks(where):
    args = Case(2, 4, 2, 517, 900, 128, 128, 128, torch.bfloat16, all_kept=True).build("cuda")
    counts = torch.ones(2, 900, dtype=torch.bool, device="cuda")
    first, end = {"text": (890, 900), "a block": (128, 256), "all": (0, 900)}[where]
    counts[1, first:end] = False
    args["key"][~counts] = torch.nan
    args["value"][~counts] = torch.nan
    check({**args, "key_mask": counts}, "gluon")


def test_rows_without_keys_where_nothing_is_masked():
    check(Case(2, 4, 2, 146, 384, 96, 128, 128, torch.float16).build("cuda"), "gluon")


def test_the_counter_of_work_is_left_at_zero(monkeypatch):
    from fastdiff.kernels import hopper

    one = torch.zeros(4, dtype=torch.int32, device="cuda")
    monkeypatch.setattr(hopper, "_counters", lambda device: itertools.repeat(one))
    for seed in range(20):
        check(Case(1, 4, 2, 100 * seed + 1, 900, 64, 128, 128, torch.float16, seed=seed,
                   ordered=seed % 2 == 1)
              .build("cuda"), "gluon")
        assert not one.any()


def test_probe():
    assert probe("gluon", "cuda") is None
