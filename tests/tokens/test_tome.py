"""Token merging, the control: what merges, where it acts, and that it comes out again."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import pytest
import torch
import zoo

import fastdiff
from fastdiff.tokens.at_edm import AtEdm
from fastdiff.tokens.kv_downsample import KVDownsample
from fastdiff.tokens.rank import rows
from fastdiff.tokens.tome import ToMe, destinations, merge_tokens, plan_merge

FAMILIES = ("sd15", "sdxl", "pixart_sigma")
NOW = torch.tensor(3)


def calls(pipe):
    return pipe.fastdiff.report.methods["tome"]["attention calls on merged tokens"]


def test_one_destination_in_every_whole_cell():
    assert destinations(3, 5, None).tolist() == [[0, 2, ]]
    for seed in range(5):
        found = destinations(4, 7, seed)[0]
        cells = {(int(t) // 7 // 2, int(t) % 7 // 2) for t in found}
        assert len(found) == 6 == len(cells) and (found.diff() > 0).all()
    assert not torch.equal(destinations(8, 8, 1), destinations(8, 8, 2))


@pytest.mark.parametrize("random", (False, True))
@pytest.mark.parametrize("gone", (1, 8, 23))
def test_merging_means_and_copies_back(gone, random):
    states = torch.randn(2, 30, 6)
    place, order, lengths = plan_merge(states, NOW, 5, 6, gone, random)
    merged = merge_tokens(states, order, lengths)
    assert merged.shape == (2, 30 - gone, 6) and lengths.min() >= 1
    for b in range(2):
        for spot in range(30 - gone):
            mean = states[b, place[b] == spot].mean(0)
            torch.testing.assert_close(merged[b, spot], mean)
    back = rows(merged, place)
    single = lengths.gather(1, place) == 1
    assert torch.equal(back[single], states[single])


def test_the_most_similar_merge():
    states = torch.randn(1, 16, 8)
    states[0, 5] = states[0, 2] * 2  # token 2 is a destination, 5 is not
    states[0, 13] = states[0, 10] * 3
    place, _, lengths = plan_merge(states, NOW, 4, 4, 2, False)
    assert place[0, 5] == place[0, 2] and place[0, 13] == place[0, 10]
    assert lengths.sum() == 16 and (lengths == 2).sum() == 2


def test_operators_are_well_formed():
    states = torch.randn(2, 30, 6)
    arguments = (states, NOW, 5, 6, 8, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(plan_merge, arguments, test_utils=checks)
    _, order, lengths = plan_merge(*arguments)
    torch.library.opcheck(merge_tokens, (states, order, lengths), test_utils=checks)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_acts_and_leaves_no_trace(name):
    pipe = zoo.build(name)
    stock, before = zoo.call(name, pipe), zoo.fingerprint(pipe)
    fastdiff.enable(pipe, ToMe(ratio=0.0), strict=True)
    assert torch.equal(zoo.call(name, pipe), stock)
    fastdiff.enable(pipe, ToMe(), strict=True)
    found = zoo.call(name, pipe)
    assert found.isfinite().all() and not torch.equal(found, stock)
    assert torch.equal(zoo.call(name, pipe), found)
    # sd15: one block down and two up at the finest level; sdxl: one and two of two layers
    assert calls(pipe) == 2 * {"sd15": 3, "sdxl": 6, "pixart_sigma": 2}[name]
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
    assert zoo.fingerprint(pipe) == before


def test_more_levels():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, ToMe(levels=2), strict=True)
    zoo.call("sd15", pipe)
    assert calls(pipe) == 2 * 6
    fastdiff.enable(pipe, ToMe(levels=3), strict=True)
    zoo.call("sd15", pipe)
    assert calls(pipe) == 2 * 6  # the middle has a level of its own, far down


def test_a_batch_of_two_is_two_runs_and_a_seed_is_a_picture():
    pipe = zoo.build("sdxl")
    fastdiff.enable(pipe, ToMe(), strict=True)
    prompts = ["a red cat", "two blue dogs"]
    both = zoo.call("sdxl", pipe, prompt=prompts)
    for i, prompt in enumerate(prompts):
        zoo.assert_near(both[i:i + 1], zoo.call("sdxl", pipe, seed=i, prompt=[prompt]))
    state = torch.random.get_rng_state()
    first = zoo.call("sdxl", pipe)
    assert torch.equal(torch.random.get_rng_state(), state)
    fastdiff.enable(pipe, ToMe(seed=1), strict=True)
    assert not torch.equal(zoo.call("sdxl", pipe), first)


def test_clashes_and_refusals():
    pipe = zoo.build("sdxl")
    before = zoo.fingerprint(pipe)
    for methods in ((ToMe(), AtEdm()), (AtEdm(), ToMe())):
        with pytest.raises(ValueError, match="change the same tokens of a model: use one"):
            fastdiff.enable(pipe, *methods)
        assert zoo.fingerprint(pipe) == before
    fastdiff.enable(pipe, ToMe(), KVDownsample(min_tokens=0, guard=False))
    zoo.call("sdxl", pipe)
    pipe.disable_fastdiff()
    for name in ("wan", "sd3", "flux"):
        with pytest.raises(ValueError, match="Use kv-downsample there"):
            fastdiff.enable(zoo.build(name), ToMe())
    for knob in ({"ratio": 0.8}, {"levels": 0}, {"dense_steps": -1}):
        with pytest.raises(ValueError, match="is not possible"):
            ToMe(**knob)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_all_steps():
    graphs = []
    pipe, twin = zoo.build("pixart_sigma"), zoo.build("pixart_sigma")
    pipe.transformer = torch.compile(
        pipe.transformer, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    sparse = fastdiff.TileSparse(**{k: v for k, v in zoo.small_options("pixart_sigma").items()
                                    if k != "strict"})
    # methods come and go on a compiled model: each time it is what it is without the compiler
    for methods in ((ToMe(),), (sparse,), (sparse, ToMe()), (ToMe(),)):
        graphs.clear()
        for one in (pipe, twin):
            fastdiff.enable(one, *methods, strict=True)
        eager = zoo.call("pixart_sigma", twin, num_inference_steps=3)
        assert torch.equal(zoo.call("pixart_sigma", pipe, num_inference_steps=3), eager)
        assert len(graphs) <= 1
