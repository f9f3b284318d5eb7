"""LinFusion weights: the format, in and out, what LoRAs can do, refusals."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json
import logging

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.tokens.at_edm import AtEdm
from fastdiff.tokens.kv_downsample import KVDownsample
from fastdiff.tokens.linfusion import LinFusion
from fastdiff.tokens.linfusion_format import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_OLD,
    LinearLayer,
    Place,
    begin,
    read,
    write,
)

UNETS = ("sd15", "sdxl")


def made(folder, name="sdxl", hidden=None):
    """Weights in the published format for one of our UNets, with projections that do something."""
    torch.manual_seed(5)
    layers = begin(zoo.build(name).unet, hidden)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    write(folder, layers)
    return layers


def published_keys(layers):
    projection = [f"{n}_.{i}.{p}" for n in ("to_q", "to_k") for i in (0, 1, 3)
                  for p in ("weight", "bias")]
    one = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias",
           *projection]
    return {f"{i}.{key}" for i in range(layers) for key in one}


def test_the_format(tmp_path):
    layers = made(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    first = config["modules_list"][0]
    assert first == {"module_name": "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
                     "dim_n": 64, "heads": 4, "projection_mid_dim": None}
    assert set(load_file(tmp_path / WEIGHTS)) == published_keys(len(layers))
    again = read(tmp_path)
    assert list(again) == list(layers)
    for place, layer in layers.items():
        for key, value in layer.state_dict().items():
            assert torch.equal(again[place].state_dict()[key], value)


def test_a_layer_computes_what_the_paper_says():
    layer = LinearLayer(Place("x", 12, 3, 5)).double()
    states = torch.randn(2, 7, 12, dtype=torch.float64)

    def heads(x):
        return x.unflatten(-1, (3, 4)).transpose(1, 2)

    q = heads(layer.to_q(states + layer.to_q_(states)))
    k = heads(layer.to_k(states + layer.to_k_(states)))
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    state = k.mT @ heads(layer.to_v(states)) / 7
    out = q @ state / (q @ k.mean(2, keepdim=True).mT + 1e-4)
    torch.testing.assert_close(layer(states), layer.to_out[0](out.transpose(1, 2).flatten(2)))
    with torch.no_grad():
        torch.testing.assert_close(layer(states), layer(states).detach())


@pytest.mark.parametrize("hidden", [None, 8, -1])
@pytest.mark.parametrize("name", UNETS)
def test_in_and_out(name, hidden, tmp_path):
    made(tmp_path, name, hidden)
    pipe = zoo.build(name)
    stock, before = zoo.call(name, pipe), zoo.fingerprint(pipe)
    keys = set(pipe.unet.state_dict())
    fastdiff.enable(pipe, LinFusion(weights=str(tmp_path)), strict=True)
    found = zoo.call(name, pipe)
    assert found.isfinite().all() and not torch.equal(found, stock)
    assert torch.equal(zoo.call(name, pipe), found)
    assert set(pipe.unet.state_dict()) == keys
    assert pipe.fastdiff.report.methods["linfusion"]["layers"] == {"sd15": 7, "sdxl": 8}[name]
    prompts = ["a red cat", "two blue dogs"]
    both = zoo.call(name, pipe, prompt=prompts)
    zoo.assert_near(both[1:], zoo.call(name, pipe, seed=1, prompt=prompts[1:]))
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
    assert zoo.fingerprint(pipe) == before


def test_old_weight_files(tmp_path):
    layers = made(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS_OLD)
    (tmp_path / WEIGHTS).unlink()
    assert list(read(tmp_path)) == list(layers)


def test_processors_that_others_replace(tmp_path):
    made(tmp_path, "sd15")
    pipe = zoo.build("sd15")
    stock = zoo.call("sd15", pipe)
    fastdiff.enable(pipe, LinFusion(weights=str(tmp_path)), strict=True)
    found = zoo.call("sd15", pipe)
    # as load_ip_adapter does
    pipe.unet.set_attn_processor({n: type(p)() for n, p in pipe.unet.attn_processors.items()})
    assert torch.equal(zoo.call("sd15", pipe), found)
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(zoo.call("sd15", pipe), found)
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call("sd15", pipe), stock)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def lora(unet, ends):
    found = {}
    for path, module in unet.named_modules():
        if path.endswith(ends) and isinstance(module, torch.nn.Linear):
            for side, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                found[f"unet.{path}.lora_{side}.weight"] = torch.randn(shape) * 0.3
    return found


def test_which_loras_cannot_apply(tmp_path, caplog):
    made(tmp_path)
    pipe = zoo.build("sdxl")
    fastdiff.enable(pipe, LinFusion(weights=str(tmp_path)), strict=True)
    plain = zoo.call("sdxl", pipe)
    what = "LoRA without effect on self-attention"
    pipe.load_lora_weights(lora(pipe.unet, ("attn2.to_q", "ff.net.2")), adapter_name="fine")
    assert not torch.equal(zoo.call("sdxl", pipe), plain)
    assert what not in pipe.fastdiff.report.methods["linfusion"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora(pipe.unet, "attn1.to_q"), adapter_name="lost")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert torch.equal(zoo.call("sdxl", pipe), plain)
    assert pipe.fastdiff.report.methods["linfusion"][what] == "lost (wholly)"
    assert "lost (wholly)" in caplog.text
    weights = lora(zoo.build("sdxl").unet, ("attn1.to_q", "attn2.to_q"))
    pipe.load_lora_weights(weights, adapter_name="both")
    pipe.set_adapters(["lost", "both"])
    zoo.call("sdxl", pipe)
    assert pipe.fastdiff.report.methods["linfusion"][what] == "both (partly), lost (wholly)"


def test_refusals(tmp_path):
    pipe = zoo.build("sdxl")
    before = zoo.fingerprint(pipe)

    def refused(match, *methods):
        with pytest.raises(ValueError, match=match):
            fastdiff.enable(pipe, *methods)
        assert zoo.fingerprint(pipe) == before

    refused("needs weights", LinFusion())
    refused("holds no LinFusion weights", LinFusion(weights=str(tmp_path)))
    good = tmp_path / "good"
    made(good)
    other = tmp_path / "other"
    made(other, "sd15")
    refused("are for another model", LinFusion(weights=str(other)))
    weights = LinFusion(weights=str(good))
    for method in (AtEdm(), KVDownsample()):
        refused("change the same tokens", weights, method)
        refused("change the same tokens", method, weights)
    refused("use one of the two", fastdiff.TileSparse(), weights)
    tensors = load_file(good / WEIGHTS)
    del tensors["3.to_q_.0.bias"]
    save_file(tensors, good / WEIGHTS)
    refused("do not fit its config", weights)
    (good / WEIGHTS).unlink()
    refused("but neither", weights)
    (good / CONFIG).write_text("{}")
    refused("is no LinFusion config", weights)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph(tmp_path):
    made(tmp_path, "sd15")
    pipe, twin = zoo.build("sd15"), zoo.build("sd15")
    graphs = []
    for one in (pipe, twin):
        fastdiff.enable(one, LinFusion(weights=str(tmp_path)), strict=True)
    pipe.unet = torch.compile(
        pipe.unet, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    assert torch.equal(zoo.call("sd15", pipe), zoo.call("sd15", twin))
    assert len(graphs) == 1
