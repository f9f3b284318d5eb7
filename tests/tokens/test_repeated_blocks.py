"""Token methods under diffusers' regional compilation: the hooks of a layer are traced with it."""

# diffusers exports its classes lazily; no type is checked here
# pyright: basic, reportPrivateImportUsage=false

from typing import Any

import pytest
import torch
import zoo

import fastdiff
from fastdiff.tokens.at_edm import AtEdm
from fastdiff.tokens.kv_downsample import KVDownsample
from fastdiff.tokens.zero_tprune import ZeroTPrune

OFF: dict[str, Any] = {"guard": False}
CASES = {
    "at-edm": (AtEdm(early_steps=1, **OFF),),
    "at-edm, increment": (AtEdm(recover="increment", early_steps=0, **OFF),),
    "zero-tprune": (ZeroTPrune(early_steps=0, **OFF),),
    "at-edm + kv-downsample": (AtEdm(early_steps=1, **OFF), KVDownsample(min_tokens=0, **OFF)),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", CASES)
def test_compiled_layers_do_what_they_do_eagerly(name):
    pipe, twin = zoo.build("sdxl"), zoo.build("sdxl")
    stock = zoo.call("sdxl", twin)
    for one in (pipe, twin):
        fastdiff.enable(one, *CASES[name], strict=True)
    wanted = zoo.call("sdxl", twin)
    assert not torch.equal(wanted, stock)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counted)
    assert torch.equal(zoo.call("sdxl", pipe), wanted)
    made = len(graphs)
    # the default limit of graphs for one piece of code; blocks of one form share theirs
    assert 0 < made <= 8
    assert torch.equal(zoo.call("sdxl", pipe), wanted)
    assert len(graphs) == made
    fastdiff.disable(pipe)
    assert torch.equal(zoo.call("sdxl", pipe), stock)
