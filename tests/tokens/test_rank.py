"""Ranking and recovery: against the dense page rank in float64, and what must always hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.tokens.at_edm import rank_by_attention
from fastdiff.tokens.rank import aligned, best, page_rank, rest_of, rows, stand_ins
from fastdiff.tokens.zero_tprune import over_heads, rank_in_stages, without_alike


def attention(tokens=40, batch=2, heads=3, dim=8, seed=0, sharp=2.0):
    g = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, tokens, heads, dim, generator=g, dtype=torch.float64)
    return query * sharp, key


def dense(query, key):
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    return (q @ k.mT * query.shape[-1] ** -0.5).softmax(-1)


def dense_page_rank(query, key, iterations):
    a = dense(query, key)
    score = torch.full_like(a[..., 0], 1 / a.shape[-1])
    for _ in range(iterations):
        score = (a.mT @ score[..., None])[..., 0]
    return score * a.shape[-1]


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(2, 70), iterations=st.integers(1, 12), sharp=st.floats(0, 4),
       seed=st.integers(0, 99))
def test_page_rank_equals_the_dense_one(tokens, iterations, sharp, seed):
    query, key = attention(tokens, seed=seed, sharp=sharp)
    wanted = dense_page_rank(query, key, iterations)
    found = page_rank(query, key, iterations)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)
    torch.testing.assert_close(found.mean(-1), torch.ones(2, 3, dtype=torch.float64))
    count = max(1, tokens // 3)
    kept, _ = rank_by_attention(query, key, None, count, 1, iterations, "keys")
    assert torch.equal(kept, best(wanted.mean(1), count))


def test_page_rank_follows_a_permutation():
    query, key = attention()
    order = torch.randperm(40)
    torch.testing.assert_close(
        page_rank(query[:, order], key[:, order], 3), page_rank(query, key, 3)[..., order])


def test_uniform_and_doubly_stochastic_attention_rank_nothing():
    """Equal scores: the first tokens stay, whatever the rounding of an equal sum is."""
    query, key = attention(sharp=0.0)
    torch.testing.assert_close(page_rank(query, key, 4), torch.ones_like(page_rank(query, key, 1)))
    kept, _ = rank_by_attention(query, key, None, 10, 1, 1, "keys")
    assert torch.equal(kept, torch.arange(10).expand(2, 10))
    # a circulant map: scores q_i k_j depend on i - j alone
    angle = torch.arange(16, dtype=torch.float64) * (2 * torch.pi / 16)
    circle = torch.stack((angle.cos(), angle.sin()), -1).view(1, 16, 1, 2)
    torch.testing.assert_close(page_rank(circle, circle, 5), torch.ones(1, 1, 16).double())


def test_best_breaks_ties_by_position_and_sorts():
    score = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    assert best(score, 2).tolist() == [[1, 2]]
    assert best(score, 4).tolist() == [[0, 1, 2, 4]]
    assert rest_of(torch.tensor([[0, 2]]), 5).tolist() == [[1, 3, 4]]


def test_aligned_branches_of_each_sample():
    score = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [0.0, 6.0]])
    wanted = [[2.0, 2.0], [1.0, 3.0], [2.0, 2.0], [1.0, 3.0]]
    assert aligned(score, 2).tolist() == wanted
    assert aligned(score, 1) is score and aligned(score, 3) is score


@pytest.mark.parametrize("tokens,count", [(30, 11), (7, 7), (7, 1)])
def test_stand_ins_are_the_most_attended_kept_tokens(tokens, count):
    query, key = attention(tokens)
    kept = best(torch.rand(2, tokens), count)
    place = stand_ins(query, key, kept, alike="attention")
    assert torch.equal(place.gather(1, kept), torch.arange(count).expand(2, count))
    log_product = dense(query, key).log().sum(1)
    for sample in range(2):
        for token in rest_of(kept, tokens)[sample].tolist():
            seen = log_product[sample, token, kept[sample]]
            assert place[sample, token] == seen.argmax()


@pytest.mark.parametrize("tokens,count", [(30, 11), (7, 7), (7, 1)])
def test_stand_ins_have_the_most_similar_keys(tokens, count):
    query, key = attention(tokens)
    # lengths of keys say nothing
    key = key * torch.logspace(-2, 2, tokens).view(1, tokens, 1, 1)
    kept = best(torch.rand(2, tokens), count)
    place = stand_ins(query, key, kept)
    assert torch.equal(place.gather(1, kept), torch.arange(count).expand(2, count))
    for sample in range(2):
        flat = key[sample].flatten(1)
        for token in rest_of(kept, tokens)[sample].tolist():
            cosine = torch.cosine_similarity(flat[token], flat[kept[sample]], dim=-1)
            assert place[sample, token] == cosine.argmax()


def test_stand_ins_in_chunks(monkeypatch):
    query, key = attention(33)
    kept = best(torch.rand(2, 33), 12)
    whole = stand_ins(query, key, kept)
    monkeypatch.setattr("fastdiff.kernels.token_select.torch_impl.PAIRS", 30)
    assert torch.equal(stand_ins(query, key, kept), whole)


def test_gather_and_fill_keep_kept_rows_exactly():
    query, key = attention(20)
    kept, place = rank_by_attention(query, key, None, 7, 1, 1, "keys")
    states = torch.randn(2, 20, 5)
    filled = rows(rows(states, kept), place)
    assert torch.equal(rows(filled, kept), rows(states, kept))
    for sample in range(2):
        for row in filled[sample]:
            assert (states[sample, kept[sample]] == row).all(-1).any()


@pytest.mark.parametrize("ranking", [
    lambda q, k, b: rank_by_attention(q, k, None, 9, b, 2, "attention"),
    lambda q, k, b: rank_in_stages(q, k, None, 9, b, 0.4, 3, 0.01, 0.7, "keys"),
])
def test_a_batch_is_ranked_sample_by_sample(ranking):
    query, key = attention(31, batch=4)
    kept, place = ranking(query, key, 1)
    for i in range(4):
        one_kept, one_place = ranking(query[i:i + 1], key[i:i + 1], 1)
        assert torch.equal(one_kept[0], kept[i]) and torch.equal(one_place[0], place[i])
    kept, place = ranking(query, key, 2)
    assert torch.equal(kept[:2], kept[2:]) and not torch.equal(place[:2], place[2:])
    assert (kept.diff(dim=1) > 0).all()


def test_ranking_operators_are_well_formed():
    query, key = (x.float() for x in attention(12))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(rank_by_attention, (query, key, None, 5, 2, 1, "keys"), test_utils=checks)
    arguments = (query, key, 0.3, 5, 1, 0.3, 2, 0.01, 0.7, "attention")
    torch.library.opcheck(rank_in_stages, arguments, test_utils=checks)


# Zero-TPrune's stages


def test_heads_by_root_mean_square_with_a_variance_filter():
    score = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0], [0.5, 1.5, 0.9, 1.1]]])
    wanted = (score.square().mean(1)).sqrt()
    torch.testing.assert_close(over_heads(score), wanted)
    # variances 0, 1.5 and 0.13 on scores of mean 1
    torch.testing.assert_close(over_heads(score, 0.01, 0.7), score[:, 2])
    # no head passes, so all vote
    torch.testing.assert_close(over_heads(score, 5.0, 6.0), wanted)


def test_the_similarity_stage_drops_copies_of_important_tokens():
    key = torch.randn(1, 8, 2, 4)
    key[0, 1] = key[0, 6] * 3  # the same direction
    key[0, 2] = key[0, 5] * 0.5
    score = torch.tensor([[0.5, 0.4, 0.3, 0.2, 2.0, 2.1, 2.2, 2.3]])
    assert without_alike(key, score, 2, 1).tolist() == [[0, 3, 4, 5, 6, 7]]
    assert without_alike(key, score, 0, 1).tolist() == [list(range(8))]


def test_without_the_similarity_stage_only_importance_is_left():
    query, key = attention(24, heads=1)
    kept, _ = rank_in_stages(query, key, None, 8, 1, 0.0, 2, 0.0, 1e9, "keys")
    assert torch.equal(kept, best(dense_page_rank(query, key, 2)[:, 0], 8))
