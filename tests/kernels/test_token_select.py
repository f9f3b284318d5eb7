"""Token selection: by hand, every implementation against the stable sort and all products."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_process import run_apart

from fastdiff.kernels.token_select import implementations, stand_ins, top_tokens, torch_impl

PLAIN = ("reference", "torch")


def scores(batch, tokens, kind, seed=0):
    """Scores with ties of both zeros, infinities and NaN in them."""
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(batch, tokens, generator=g)
    if kind == "ties":
        score = (score * 2).round() / 2
        score[:, ::3] *= -0.0
    elif kind == "wild":
        odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e-40, -1e-40, 1e38])
        score = odd[torch.randint(8, score.shape, generator=g)]
    elif kind == "equal":
        score = torch.full_like(score, 0.25)
    return score


def parts(batch, tokens, count, seed=0):
    """Random kept positions, ascending, and the others."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, tokens, generator=g).argsort(1)
    return order[:, :count].sort(1).values, order[:, count:].sort(1).values


@pytest.mark.parametrize("impl", PLAIN)
def test_by_hand(impl):
    score = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [torch.nan, 0.0, -0.0, 5.0, -1.0]])
    kept, dropped = top_tokens(score, 2, impl=impl)
    assert kept.tolist() == [[1, 2], [0, 3]] and dropped.tolist() == [[0, 3, 4], [1, 2, 4]]
    kept, dropped = top_tokens(score, 3, impl=impl)
    assert kept.tolist() == [[1, 2, 4], [0, 1, 3]]
    # token 0 is most like token 3, token 2 equally like both: the first of them
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])
    key = torch.tensor([[[9.0, 9.0], [0.0, 2.0], [9.0, 9.0], [2.0, 0.0]]])
    kept, dropped = torch.tensor([[1, 3]]), torch.tensor([[0, 2]])
    assert stand_ins(query, key, kept, dropped, impl=impl).tolist() == [[1, 0, 0, 1]]


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 90), share=st.floats(0, 1),
       kind=st.sampled_from(["plain", "ties", "equal", "wild"]), seed=st.integers(0, 99))
def test_the_two_parts_are_all_and_the_first_is_higher(batch, tokens, share, kind, seed):
    score, count = scores(batch, tokens, kind, seed), round(share * tokens)
    for impl in PLAIN:
        kept, dropped = top_tokens(score, count, impl=impl)
        assert torch.equal(torch.cat((kept, dropped), 1).sort(1).values,
                           torch.arange(tokens).expand(batch, -1))
        assert (kept.diff() > 0).all() and (dropped.diff() > 0).all()
        if 0 < count < tokens and kind != "wild":
            assert (score.gather(1, kept).amin(1) >= score.gather(1, dropped).amax(1)).all()


def test_parts_of_the_products_do_not_show(monkeypatch):
    query, key = torch.randn(2, 2, 40, 12)
    kept, dropped = parts(2, 40, 11)
    whole = stand_ins(query, key, kept, dropped)
    assert torch.equal(whole, stand_ins(query, key, kept, dropped, impl="reference"))
    monkeypatch.setattr(torch_impl, "PAIRS", 1)
    assert torch.equal(stand_ins(query, key, kept, dropped), whole)
    assert torch.equal(whole.gather(1, kept), torch.arange(11).expand(2, -1))


def test_half_precision_stays_in_range():
    """Products of 1,280 channels beyond what half precision holds: `scale` brings them back."""
    query = torch.full((1, 4, 1280), 20.0, dtype=torch.float16)
    key = query * torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=torch.float16)[:, None]
    kept, dropped = torch.tensor([[1, 3]]), torch.tensor([[0, 2]])
    found = stand_ins(query, key, kept, dropped, scale=1280**-0.5)
    assert found.tolist() == [[1, 0, 1, 1]]


def test_refusals():
    score = torch.rand(2, 5)
    with pytest.raises(ValueError, match="count must be from 0 to 5, got 6"):
        top_tokens(score, 6)
    with pytest.raises(ValueError, match="score must be floating"):
        top_tokens(score.long(), 2)
    with pytest.raises(ValueError, match="impl must be"):
        top_tokens(score, 2, impl="fastest")
    kept, dropped = parts(2, 5, 2)
    query = torch.rand(2, 5, 8)
    with pytest.raises(ValueError, match="query and key must be"):
        stand_ins(query, query[:, :4], kept, dropped)
    with pytest.raises(ValueError, match="one kept at least, got 2 and 2"):
        stand_ins(query, query, kept, dropped[:, 1:])
    with pytest.raises(ValueError, match="kept must be int64"):
        stand_ins(query, query, kept.int(), dropped)
    with pytest.raises(ValueError, match="scale must be positive"):
        stand_ins(query, query, kept, dropped, scale=0.0)
    assert implementations("cpu", torch.float32)["torch"] == []


TRITON = """
import sys, torch
sys.path.insert(0, "tests/kernels")
from attention_cases import poisoned
from test_token_select import parts, scores
from fastdiff.kernels.token_select import stand_ins, top_tokens
device = "cuda" if torch.cuda.is_available() else "cpu"
sizes = [(1, 1), (2, 16), (3, 37), (2, 129), (1, 700)]
if device == "cuda":
    sizes += [(2, 4096), (2, 5000), (1, 16384), (1, 32768)]
for batch, tokens in sizes:
    for kind in ("plain", "ties", "equal", "wild"):
        score = scores(batch, tokens, kind)
        for count in sorted({0, 1, tokens // 3, tokens - 1, tokens}):
            for dtype in (torch.float32, torch.bfloat16):
                wide = torch.stack((score, score), 2).to(dtype)[:, :, 0]
                wide = wide.to(device)
                wanted = top_tokens(wide, count, impl="reference")
                with poisoned():
                    found = top_tokens(wide, count, impl="triton")
                for a, b in zip(found, wanted):
                    assert torch.equal(a, b), (tokens, kind, count, dtype)
cases = [(1, 5, 40, 1), (2, 70, 24, 23), (2, 130, 130, 129), (1, 260, 64, 140), (2, 33, 96, 33)]
if device == "cuda":
    cases += [(2, 1024, 1280, 376), (2, 4096, 1280, 1512), (1, 16384, 640, 6064)]
for number, (batch, tokens, width, count) in enumerate(cases):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        g = torch.Generator().manual_seed(number)
        whole = torch.randn(2, batch, tokens + 3, width + 8, generator=g).to(dtype).to(device)
        query, key = whole[:, :, 2:-1, :width]
        if number == 1:
            # equal keys: the first of the kept ones
            key = key[:, :1].expand(-1, tokens, -1).contiguous()
        kept, dropped = (x.to(device) for x in parts(batch, tokens, count))
        with poisoned():
            found = stand_ins(query, key, kept, dropped, scale=width**-0.5, impl="triton")
        own = torch.arange(count, device=device).expand_as(kept)
        assert torch.equal(found.gather(1, kept), own)
        exact = query.double() @ key.double().mT
        exact = exact.gather(2, kept[:, None].expand(-1, tokens, -1))
        taken = exact.gather(2, found[..., None])[..., 0].gather(1, dropped)
        best = exact.amax(-1).gather(1, dropped)
        # float32 sums of products that are exact, of three TF32 passes for float32
        size = query.double().norm(dim=-1).gather(1, dropped) * key.double().norm(dim=-1).amax()
        assert (best - taken <= 2e-6 * size).all(), (tokens, width, dtype)
        if number == 1:
            assert (found.gather(1, dropped) == 0).all()
print("all right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton():
    """Interpreted in a process of its own, or compiled where a GPU is."""
    done = run_apart(TRITON)
    assert done.returncode == 0 and "all right" in done.stdout, done.stderr[-3000:]
