"""Column mass: by hand, against the dense product, and every implementation against float64."""

import importlib.util

import pytest
import torch
from attention_cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_process import run_apart

from fastdiff.kernels.column_mass import column_mass, implementations, row_lse


def case(batch=2, queries=37, keys=50, heads=4, kv_heads=2, dim=24, dtype=torch.float32, seed=0,
         strided=False):
    g = torch.Generator().manual_seed(seed)

    def randn(b, s, h, d):
        if strided:
            whole = torch.randn(b, h + 1, s + 3, d + 8, generator=g).to(dtype)
            return whole[:, 1:, 2:-1, :d].transpose(1, 2)
        return torch.randn(b, s, h, d, generator=g).to(dtype)

    return randn(batch, queries, heads, dim), randn(batch, keys, kv_heads, dim)


def dense(query, key, scale=None):
    """The attention map itself, float64 [B, H, Sq, Sk]."""
    groups = query.shape[2] // key.shape[2]
    q = query.double().transpose(1, 2)
    k = key.double().transpose(1, 2).repeat_interleave(groups, 1)
    return (q @ k.mT * (scale or query.shape[-1] ** -0.5)).softmax(-1)


@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_by_hand(impl):
    # two queries, two keys, scores (0, log 3) and (log 3, 0): rows 1/4, 3/4 and 3/4, 1/4
    log3 = torch.tensor(3.0).log().item()
    query = torch.tensor([[0.0, log3], [log3, 0.0]]).view(1, 2, 1, 2)
    key = torch.eye(2).view(1, 2, 1, 2)
    mass = column_mass(query, key, scale=1.0, impl=impl).exp().flatten()
    torch.testing.assert_close(mass, torch.tensor([0.5, 0.5]))
    weight = torch.tensor([1.0, 0.0]).log().view(1, 1, 2)
    mass = column_mass(query, key, None, weight, scale=1.0, impl=impl).exp().flatten()
    torch.testing.assert_close(mass, torch.tensor([0.25, 0.75]))


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), heads=st.sampled_from([(1, 1), (4, 2)]),
    dim=st.sampled_from([1, 8, 40]), weighted=st.booleans(), strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_product(queries, keys, heads, dim, weighted, strided, seed):
    query, key = case(2, queries, keys, heads[0], heads[1], dim, torch.float64, seed, strided)
    s = torch.full((2, heads[0], queries), 1 / queries, dtype=torch.float64)
    if weighted:
        s = torch.rand(2, heads[0], queries, dtype=torch.float64) + 1e-3
    wanted = (dense(query, key).mT @ s[..., None])[..., 0]
    for impl in ("reference", "torch"):
        found = column_mass(query, key, None, s.log() if weighted else None, impl=impl).exp()
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.sum(-1), s.sum(-1), rtol=1e-12, atol=0)


def test_a_given_lse_is_used():
    query, key = case(dtype=torch.float64)
    lse = row_lse(query, key)
    scores = query.transpose(1, 2) @ key.transpose(1, 2).repeat_interleave(2, 1).mT
    torch.testing.assert_close(lse, (scores * 24**-0.5).logsumexp(-1))
    torch.testing.assert_close(column_mass(query, key, lse), column_mass(query, key))
    torch.testing.assert_close(column_mass(query, key, lse + 1), column_mass(query, key) - 1)


def test_queries_that_weigh_nothing():
    query, key = case()
    weight = torch.full((2, 4, 37), -torch.inf)
    for impl in ("reference", "torch"):
        assert (column_mass(query, key, None, weight, impl=impl) == -torch.inf).all()


def test_chunks_do_not_show(monkeypatch):
    from fastdiff.kernels.column_mass import torch_impl

    query, key = case(dtype=torch.float64)
    whole = column_mass(query, key)
    monkeypatch.setattr(torch_impl, "SCORES", 1)
    torch.testing.assert_close(column_mass(query, key), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_precision_input_is_summed_in_float32(dtype):
    query, key = case(queries=300, keys=200, dtype=dtype)
    found = column_mass(query, key)
    assert found.dtype == torch.float32
    wanted = column_mass(query.double(), key.double(), impl="reference")
    # the inputs are exact, so only float32 sums are left
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)


def test_refusals():
    query, key = case()
    with pytest.raises(ValueError, match="does not fit"):
        column_mass(query, key[:1])
    with pytest.raises(ValueError, match="lse must be torch.float32"):
        column_mass(query, key, torch.zeros(2, 4, 36))
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        column_mass(query.mT.contiguous().mT, key)
    with pytest.raises(ValueError, match="at least one query"):
        column_mass(query[:, :0], key)
    with pytest.raises(ValueError, match="impl must be"):
        column_mass(query, key, impl="fastest")
    with pytest.raises(ValueError, match="no backward"):
        column_mass(query.requires_grad_(), key)
    assert implementations("cpu", torch.float32, 24)["torch"] == []


TRITON = """
import torch, sys
sys.path.insert(0, "tests/kernels")
from attention_cases import poisoned
from test_column_mass import case
from fastdiff.kernels.column_mass import column_mass
device = "cuda" if torch.cuda.is_available() else "cpu"
# whole tiles alone, whole and a rest, a rest alone, on either side
sizes = [(37, 50, 4, 2, 24), (128, 256, 2, 2, 64), (20, 140, 2, 1, 72), (17, 16, 1, 1, 160),
         (130, 129, 2, 1, 64)]
if device == "cuda":
    sizes += [(4096, 4096, 10, 10, 64), (1000, 3001, 8, 2, 128)]
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for i, (nq, nk, h, hk, d) in enumerate(sizes):
        q, k = (x.to(device) for x in case(2, nq, nk, h, hk, d, dtype, i, strided=i % 2 == 1))
        w = torch.rand(2, h, nq).log().to(device)
        w[:, :, 0] = -torch.inf
        for weight in (None, w):
            with poisoned():
                found = column_mass(q, k, None, weight, impl="triton")
            wide = None if weight is None else weight.double()
            wanted = column_mass(q.double(), k.double(), None, wide, impl="reference")
            error = (found.double() - wanted).abs().max().item()
            assert error < 1e-4, (dtype, nq, nk, h, hk, d, error)
q, k = (x.to(device) for x in case(dim=24))
nothing = torch.full((2, 4, 37), -torch.inf, device=device)
assert (column_mass(q, k, None, nothing, impl="triton") == -torch.inf).all()
# one head left out, weights far from 1 in the others: only their ratios could be lost
w = torch.randn(2, 4, 37, device=device)
far = w + torch.tensor([0.0, 500.0, -500.0, -torch.inf], device=device)[:, None]
found = column_mass(q, k, None, far, impl="triton")
near = column_mass(q, k, None, w, impl="triton")
assert (found[:, 0] == near[:, 0]).all() and (found[:, 3] == -torch.inf).all()
assert (found[:, 1] - 500 - near[:, 1]).abs().max() < 1e-4
assert (found[:, 2] + 500 - near[:, 2]).abs().max() < 1e-4
# the range: scores of 0, -180 and -400 powers of two; 2^-180 counts and 2^-400 does not
q = torch.zeros(1, 40, 1, 16, device=device)
q[..., 0] = 1
k = torch.zeros(1, 3, 1, 16, device=device)
k[0, :, 0, 0] = torch.tensor([0.0, -180.0, -400.0])
log2 = 0.6931471805599453
for weight in (None, torch.full((1, 1, 40), 30.0, device=device)):
    found = column_mass(q, k, None, weight, scale=log2, impl="triton").flatten().tolist()
    over = 0.0 if weight is None else 30 + 3.6888794541139363
    assert abs(found[0] - over) < 2e-5, found
    assert abs(found[1] - over + 180 * log2) < 1e-4 and found[2] == -torch.inf, found
    wanted = column_mass(q, k, None, weight, scale=log2, impl="torch").flatten().tolist()
    assert abs(wanted[2] - over + 400 * log2) < 1e-3
print("all right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton():
    """Interpreted in a process of its own, or compiled where a GPU is."""
    done = run_apart(TRITON)
    assert done.returncode == 0 and "all right" in done.stdout, done.stderr[-3000:]
