"""The Hopper kernel on a Hopper GPU, against float64."""

import pytest
import torch
from attention_cases import DTYPES, Case, check

from fastdiff.kernels.block_sparse_attention import implementations, probe

GPU = torch.cuda.is_available()

pytestmark = pytest.mark.skipif(
    not GPU or bool(implementations("cuda", torch.float16, 64)["gluon"]), reason="no Hopper GPU")


@pytest.mark.parametrize("case", [
    Case(2, 4, 2, 517, 900, dim, block_q, block_k, dtype, ragged, False, tail, seed=dim)
    for dim in (64, 80, 128) for dtype in DTYPES[1:] for ragged in (False, True)
    for tail in (False, True) for block_q, block_k in ((128, 128), (128, 32), (97, 117))
], ids=repr)
def test_gluon(case):
    check(case.build("cuda"), "gluon")


def test_rows_without_keys_where_nothing_is_masked():
    check(Case(2, 4, 2, 146, 384, 96, 128, 128, torch.float16).build("cuda"), "gluon")


def test_probe():
    assert probe("gluon", "cuda") is None
