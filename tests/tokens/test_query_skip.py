"""Skipped queries: which, when, what they see, beside block-sparse attention, and out again."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import pytest
import torch
import zoo

import fastdiff
from fastdiff.attention import DenseFallbackError
from fastdiff.clock import StepClock
from fastdiff.tokens.query_skip import QuerySkip, Turn
from fastdiff.tokens.skip_state import Skips, choose_queries, note_output

FAMILIES = ("sd3", "flux", "pixart_sigma", "wan", "cogvideox", "ltx")
ALWAYS = {"min_tokens": 0, "dense_steps": 0, "refresh": 2, "factor": 2}


def told(pipe):
    return pipe.fastdiff.report.methods["query-skip"]


def sparse(name, **changes):
    knobs = zoo.small_options(name, **changes)
    return fastdiff.TileSparse(**{k: v for k, v in knobs.items() if k != "strict"})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("skipped", ("pooled", "nothing"))
def test_it_skips_and_leaves_no_trace(name, skipped):
    pipe = zoo.build(name)
    stock, before = zoo.call(name, pipe), zoo.fingerprint(pipe)
    fastdiff.enable(pipe, QuerySkip(skipped=skipped, **ALWAYS), strict=True)
    found = zoo.call(name, pipe)
    assert found.isfinite().all() and not torch.equal(found, stock)
    assert torch.equal(zoo.call(name, pipe), found)
    # two steps: the first refreshes
    assert told(pipe)["calls with every query"] == told(pipe)["calls with fewer queries"] > 0
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
    assert zoo.fingerprint(pipe) == before


@pytest.mark.parametrize("change", [{"keep": 1.0}, {"refresh": 1}, {"dense_steps": 2},
                                    {"min_tokens": 10000}])
def test_identities_are_stock(change):
    pipe = zoo.build("wan")
    stock = zoo.call("wan", pipe)
    fastdiff.enable(pipe, QuerySkip(**{**ALWAYS, **change}), strict=True)
    assert torch.equal(zoo.call("wan", pipe), stock)


def test_refresh_steps():
    clock = StepClock()
    turn = Turn(clock, QuerySkip(refresh=3, dense_steps=2))
    assert turn.whole
    clock.begin(9)
    seen = []
    for _ in range(9):
        seen.append(turn.whole)
        clock.advance()
    assert seen == [True, True, False, False, True, False, False, True, False]
    turn = Turn(clock, QuerySkip(refresh=4, dense_steps=0.0))
    clock.begin(5)
    seen = []
    for _ in range(5):
        seen.append(turn.whole)
        clock.advance()
    assert seen == [True, False, False, False, True]


def test_the_queries_with_large_outputs_attend_and_text_always():
    clock = StepClock()
    state = Skips(clock)
    clock.begin(4)
    output = torch.randn(2, 12, 3, 4)
    output[:, 0] = output[:, 10:] = 0  # text, with nothing to say
    output[0, 5] = 100
    output[1, 7] = 100
    assert torch.equal(note_output(output, state.number), output)
    clock.advance()
    kept, rest = choose_queries(torch.randn(2, 12, 3, 4), state.number, 1, 2, 4)
    assert kept.tolist() == [[0, 5, 10, 11], [0, 7, 10, 11]]
    for sample in range(2):
        assert sorted(kept[sample].tolist() + rest[sample].tolist()) == list(range(12))
    # another branch has nothing noted
    clock.branch = "uncond"
    kept, _ = choose_queries(torch.randn(2, 12, 3, 4), state.number, 0, 0, 3)
    assert kept.tolist() == [[0, 1, 2]] * 2


def test_nothing_means_no_increment(monkeypatch):
    """Rows of skipped queries are zero, kept ones exactly as in stock attention."""
    from fastdiff.tokens import query_skip

    seen = []
    stock = query_skip._Queries._fewer

    def fewer(self, attend, query, key, value, layout, count):
        out = stock(self, attend, query, key, value, layout, count)
        whole = attend(query, key, value, None)
        zero = (out == 0).all(-1).all(-1)
        seen.append((zero.sum(1), layout.tokens - count))
        torch.testing.assert_close(out[~zero], whole[~zero])
        return out

    monkeypatch.setattr(query_skip._Queries, "_fewer", fewer)
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, QuerySkip(skipped="nothing", **ALWAYS), strict=True)
    zoo.call("wan", pipe)
    assert seen and all((zeros == count).all() for zeros, count in seen)


def test_a_batch_of_two_is_two_runs():
    pipe = zoo.build("sd3")
    fastdiff.enable(pipe, QuerySkip(**ALWAYS), strict=True)
    prompts = ["a red cat", "two blue dogs"]
    both = zoo.call("sd3", pipe, prompt=prompts)
    for i, prompt in enumerate(prompts):
        zoo.assert_near(both[i:i + 1], zoo.call("sd3", pipe, seed=i, prompt=[prompt]))


@pytest.mark.parametrize("name", ["wan", "sd3", "flux"])
@pytest.mark.parametrize("tail", (True, False))
def test_beside_block_sparse_attention(name, tail):
    pipe = zoo.build(name)
    fastdiff.enable(pipe, sparse(name, tail=tail), strict=True)
    alone = zoo.call(name, pipe)
    density = pipe.fastdiff.report.summary()["density"]
    fastdiff.enable(pipe, sparse(name, tail=tail), QuerySkip(keep=1.0, **ALWAYS), strict=True)
    assert torch.equal(zoo.call(name, pipe), alone)
    fastdiff.enable(pipe, sparse(name, tail=tail), QuerySkip(**ALWAYS), strict=True)
    found = zoo.call(name, pipe)
    assert found.isfinite().all() and not torch.equal(found, alone)
    calls = pipe.fastdiff.report.summary()["sparse_calls"]
    assert told(pipe)["calls with fewer tiles of queries"] == calls / 2
    # half of the calls have about half of the pairs
    assert 0.6 * density < pipe.fastdiff.report.summary()["density"] < 0.95 * density
    assert torch.equal(zoo.call(name, pipe), found)
    stock = zoo.call(name, zoo.build(name))
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)


def test_refusals():
    pipe = zoo.build("sd15")
    with pytest.raises(ValueError, match="use at-edm there"):
        fastdiff.enable(pipe, QuerySkip())
    wan = zoo.build("wan")
    before = zoo.fingerprint(wan)
    with pytest.raises(ValueError, match="pass tail=False there"):
        fastdiff.enable(wan, fastdiff.TileSparse(), QuerySkip(skipped="nothing"))
    assert zoo.fingerprint(wan) == before
    for knob in ({"keep": 0}, {"skipped": "zero"}, {"factor": 1}, {"refresh": 0},
                 {"dense_steps": 2.0}, {"min_tokens": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(knob))}=.* is not possible"):
            QuerySkip(**knob)


def test_a_mask_is_told():
    pipe = zoo.build("hunyuan_video")
    fastdiff.enable(pipe, QuerySkip(**ALWAYS), strict=True)
    with pytest.raises(DenseFallbackError, match="an attention mask"):
        zoo.call("hunyuan_video", pipe)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("methods", [
    (QuerySkip(**ALWAYS),), (sparse("wan"), QuerySkip(**ALWAYS))], ids=("alone", "beside"))
def test_few_graphs(methods):
    pipe, twin = zoo.build("wan"), zoo.build("wan")
    graphs = []
    for one in (pipe, twin):
        fastdiff.enable(one, *methods, strict=True)
    pipe.transformer = torch.compile(
        pipe.transformer, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    eager = zoo.call("wan", twin, num_inference_steps=4)
    assert torch.equal(zoo.call("wan", pipe, num_inference_steps=4), eager)
    assert len(graphs) == 3 - len(methods)
