"""The pruner in UNets: stock at its identities, in and out, schedules, batches, adapters."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

from types import SimpleNamespace

import diffusers
import pytest
import torch
import zoo

import fastdiff
from fastdiff.attention import DenseFallbackError
from fastdiff.tokens import costs
from fastdiff.tokens.at_edm import AtEdm
from fastdiff.tokens.prune import RECOVER
from fastdiff.tokens.zero_tprune import ZeroTPrune

UNETS = ("sd15", "sdxl")
METHODS = (AtEdm, ZeroTPrune)
ALWAYS = {"guard": False, "early_steps": 0}


def counts(pipe, method="at-edm"):
    return pipe.fastdiff.report.methods.get(method, {})


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("method", METHODS)
def test_it_prunes_and_leaves_no_trace(name, method):
    pipe = zoo.build(name)
    stock, before = zoo.call(name, pipe), zoo.fingerprint(pipe)
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    for recover in RECOVER:
        fastdiff.enable(pipe, method(recover=recover, **ALWAYS), strict=True)
        found = zoo.call(name, pipe)
        assert found.isfinite().all() and not torch.equal(found, stock)
        assert torch.equal(zoo.call(name, pipe), found)
        assert counts(pipe, method.name)["blocks pruned"] > 0
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
    assert zoo.fingerprint(pipe) == before
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


def test_a_loop_of_ones_own():
    pipe = zoo.build("sdxl")
    stock = zoo.call("sdxl", pipe)
    loop = SimpleNamespace(components={"unet": pipe.unet}, scheduler=pipe.scheduler)
    handle = fastdiff.enable(loop, AtEdm(**ALWAYS), strict=True)
    assert not torch.equal(zoo.call("sdxl", pipe), stock)
    assert handle.report.methods["at-edm"]["blocks pruned"] > 0
    fastdiff.disable(loop)
    assert torch.equal(zoo.call("sdxl", pipe), stock)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("change", [{"keep": 1.0}, {"keep": 0.999}])
def test_keeping_all_tokens_is_stock(name, change):
    pipe = zoo.build(name)
    stock = zoo.call(name, pipe)
    fastdiff.enable(pipe, AtEdm(**{**ALWAYS, **change}), strict=True)
    assert torch.equal(zoo.call(name, pipe), stock)


def test_later_layers_see_the_kept_tokens():
    pipe = zoo.build("sdxl")
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=True)
    seen = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.update({name: args[0].shape[1]}))
    zoo.call("sdxl", pipe)
    tokens = {name: n for name, n in seen.items() if "transformer_blocks.0" in name}
    later = {name: n for name, n in seen.items() if "transformer_blocks.1" in name}
    assert set(tokens.values()) == {140} and set(later.values()) == {round(0.37 * 140)}


def test_a_single_layer_drops_tokens_after_its_self_attention():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, AtEdm(keep=0.5, **ALWAYS), strict=True)
    seen = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith((".attn1", ".attn2", ".ff")):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.update({name: args[0].shape[1]}))
    zoo.call("sd15", pipe)
    for name, tokens in seen.items():
        block = name.rpartition(".")[0]
        assert tokens == seen[f"{block}.attn1"] // (1 if name.endswith("attn1") else 2)


def test_only_the_deepest_blocks_by_default():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8, transformer_layers_per_block=(2, 3),
    ).requires_grad_(False)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(5), torch.randn(2, 7, 32)
    pruned = {}
    for layout in ("dagger", "all"):
        handle = fastdiff.enable(unet, AtEdm(layout=layout, **ALWAYS), strict=True)
        handle.clock.begin(4)
        unet(*inputs)
        pruned[layout] = handle.report.methods["at-edm"]["blocks pruned"]
    # one block of 3 layers down, one in the middle, two up; as many of 2 layers, none in the middle
    assert pruned == {"dagger": 4, "all": 7}


def test_early_steps_spare_the_outer_blocks():
    """SDXL form: the first block of a down stage and the last of an up stage stay whole."""
    pipe = zoo.build("sdxl")
    blocks = sum(type(m).__name__ == "Transformer2DModel" for m in pipe.unet.modules())
    assert blocks == 4  # one down (first), one in the middle, two up (one is last)
    for early, steps in ((1, 4), (0.25, 4), (3, 4), (0.75, 4)):
        fastdiff.enable(pipe, AtEdm(guard=False, early_steps=early), strict=True)
        zoo.call("sdxl", pipe, num_inference_steps=steps)
        first = early if isinstance(early, int) else round(early * steps)
        whole = first * 2
        assert counts(pipe)["blocks whole: early step"] == whole
        assert counts(pipe)["blocks pruned"] == blocks * steps - whole


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_two_is_two_runs(name, method):
    pipe = zoo.build(name)
    fastdiff.enable(pipe, method(**ALWAYS), strict=True)
    prompts = ["a red cat", "two blue dogs"]
    both = zoo.call(name, pipe, prompt=prompts)
    for i, prompt in enumerate(prompts):
        zoo.assert_near(both[i:i + 1], zoo.call(name, pipe, seed=i, prompt=[prompt]))


def test_both_guidance_branches_drop_the_same_tokens(monkeypatch):
    seen = []
    stock = AtEdm.rank

    def rank(self, query, key, scale, count, branches):
        found = stock(self, query, key, scale, count, branches)
        seen.append(found[0])
        return found

    monkeypatch.setattr(AtEdm, "rank", rank)
    pipe = zoo.build("sdxl")
    prompts = ["a red cat", "two blue dogs"]
    for align in (True, False):
        seen.clear()
        fastdiff.enable(pipe, AtEdm(align=align, **ALWAYS), strict=True)
        zoo.call("sdxl", pipe, prompt=prompts)
        assert all(kept.shape[0] == 4 for kept in seen)
        assert all(torch.equal(kept[:2], kept[2:]) for kept in seen) == align
        assert not all(torch.equal(kept[0], kept[1]) for kept in seen)
    seen.clear()
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=True)
    zoo.call("sdxl", pipe, prompt=prompts, guidance_scale=1.0)
    assert all(kept.shape[0] == 2 for kept in seen)
    assert not all(torch.equal(kept[0], kept[1]) for kept in seen)


# with what else people use


@pytest.mark.parametrize("name", UNETS)
def test_lora_changes_the_ranking_and_the_picture(name):
    pipe = zoo.build(name)
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=True)
    plain = zoo.call(name, pipe)
    weights = {}
    for path, module in pipe.unet.named_modules():
        if path.endswith(("to_q", "to_k", "ff.net.2")) and isinstance(module, torch.nn.Linear):
            for side, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                weights[f"unet.{path}.lora_{side}.weight"] = torch.randn(shape) * 0.3
    pipe.load_lora_weights(dict(weights), adapter_name="one")
    after = zoo.call(name, pipe)
    assert not torch.equal(after, plain) and counts(pipe)["blocks pruned"] > 0
    fresh = zoo.build(name)
    fresh.load_lora_weights(dict(weights), adapter_name="one")
    fastdiff.enable(fresh, AtEdm(**ALWAYS), strict=True)
    assert torch.equal(zoo.call(name, fresh), after)
    pipe.unload_lora_weights()
    assert torch.equal(zoo.call(name, pipe), plain)


def test_fused_projections():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=True)
    plain = zoo.call("sd15", pipe)
    pipe.unet.fuse_qkv_projections()
    zoo.assert_near(zoo.call("sd15", pipe), plain)
    assert counts(pipe)["blocks pruned"] > 0
    pipe.disable_fastdiff()
    pipe.unet.unfuse_qkv_projections()
    assert not any("_fastdiff_original" in vars(type(p))
                   for p in pipe.unet.attn_processors.values())


def test_controlnet_residuals_meet_full_maps():
    pipe = zoo.build("sd15")
    control = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
    for parameter in control.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    control.eval().requires_grad_(False)
    both = diffusers.StableDiffusionControlNetPipeline(
        **{k: v for k, v in pipe.components.items() if k != "image_encoder"}, controlnet=control,
        requires_safety_checker=False)
    both.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 96, 72)
    stock = zoo.call("sd15", both, image=picture)
    before = zoo.fingerprint(both)
    fastdiff.enable(both, AtEdm(**ALWAYS), strict=True)
    found = zoo.call("sd15", both, image=picture)
    assert counts(both)["blocks pruned"] > 0 and not torch.equal(found, stock)
    assert not any(m._forward_hooks for m in control.modules())
    both.disable_fastdiff()
    assert torch.equal(zoo.call("sd15", both, image=picture), stock)
    assert zoo.fingerprint(both) == before


def with_ip_adapter(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    processors = {}
    for name, module in unet.named_modules():
        if not hasattr(module, "set_processor"):
            continue
        if name.endswith("attn2"):
            processors[f"{name}.processor"] = IPAdapterAttnProcessor2_0(
                hidden_size=module.query_dim, cross_attention_dim=32, num_tokens=(4,))
        else:
            processors[f"{name}.processor"] = AttnProcessor2_0()
    unet.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=16, cross_attention_dim=32,
                                 num_image_text_embeds=4)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    unet.requires_grad_(False)


def test_ip_adapter_attends_from_the_kept_tokens():
    pipe = zoo.build("sd15")
    torch.manual_seed(3)
    with_ip_adapter(pipe.unet)
    pictures = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    stock = zoo.call("sd15", pipe, **pictures)
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=True)
    found = zoo.call("sd15", pipe, **pictures)
    other = zoo.call("sd15", pipe, ip_adapter_image_embeds=[torch.randn(2, 1, 16)])
    assert counts(pipe)["blocks pruned"] > 0
    assert not torch.equal(found, stock) and not torch.equal(found, other)
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call("sd15", pipe, **pictures), stock)


def test_regional_masks_leave_the_block_whole():
    pipe = zoo.build("sd15")
    with_ip_adapter(pipe.unet)
    more = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)],
            "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 96, 72)]}}
    stock = zoo.call("sd15", pipe, **more)
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=False)
    assert torch.equal(zoo.call("sd15", pipe, **more), stock)
    assert any("ip_adapter_masks" in why for why in pipe.fastdiff.report.stock)
    fastdiff.enable(pipe, AtEdm(**ALWAYS), strict=True)
    with pytest.raises(DenseFallbackError, match="ip_adapter_masks needs every token"):
        zoo.call("sd15", pipe, **more)


def test_beside_block_sparse_attention():
    pipe = zoo.build("sdxl")
    alone = fastdiff.TileSparse(**{k: v for k, v in zoo.small_options("sdxl").items()
                                   if k != "strict"})
    fastdiff.enable(pipe, alone, AtEdm(**ALWAYS))
    found = zoo.call("sdxl", pipe)
    # the first layer of each of 4 blocks is sparse, twice; the second has no grid any more
    assert pipe.fastdiff.report.summary()["sparse_calls"] == 8
    assert counts(pipe)["blocks pruned"] == 8
    assert torch.equal(zoo.call("sdxl", pipe), found)
    pipe.disable_fastdiff()


def test_cpu_offload_hooks():
    import accelerate
    from accelerate.hooks import remove_hook_from_module

    pipe, twin = zoo.build("sdxl"), zoo.build("sdxl")
    for one in (pipe, twin):
        fastdiff.enable(one, AtEdm(**ALWAYS), strict=True)
    accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
    for _ in range(2):
        assert torch.equal(zoo.call("sdxl", pipe), zoo.call("sdxl", twin))
        remove_hook_from_module(pipe.unet)
        accelerate.cpu_offload_with_hook(pipe.unet, "cpu")


# refusals


@pytest.mark.parametrize("method", METHODS)
def test_transformers_are_refused(method):
    pipe = zoo.build("pixart_sigma")
    before = zoo.fingerprint(pipe)
    with pytest.raises(ValueError, match="use kv-downsample or query-skip"):
        fastdiff.enable(pipe, method())
    assert zoo.fingerprint(pipe) == before


@pytest.mark.parametrize("knob", [
    {"keep": 0}, {"keep": 1.5}, {"early_steps": 1.5}, {"early_steps": -1}, {"layout": "deep"},
    {"recover": "bicubic"}, {"iterations": 0},
])
def test_values_are_refused(knob):
    with pytest.raises(ValueError, match=f"{next(iter(knob))}=.* is not possible"):
        AtEdm(**knob)


def test_gradients_leave_the_block_whole():
    pipe = zoo.build("sdxl")
    handle = fastdiff.enable(pipe.unet, AtEdm(**ALWAYS))
    pipe.unet.requires_grad_(True)
    more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, 32),
                                  "time_ids": torch.randn(1, 6)}}
    pipe.unet(torch.randn(1, 4, 16, 16), 3, torch.randn(1, 7, 64), **more)
    assert any("gradients are wanted" in why for why in handle.report.stock)


# torch.compile


class Backend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_each_phase():
    pipe, twin, backend = zoo.build("sdxl"), zoo.build("sdxl"), Backend()
    method = AtEdm(guard=False, early_steps=1)
    fastdiff.enable(twin, method, strict=True)
    eager = zoo.call("sdxl", twin, num_inference_steps=3)
    fastdiff.enable(pipe, method, strict=True)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    for _ in range(2):
        assert torch.equal(zoo.call("sdxl", pipe, num_inference_steps=3), eager)
    assert backend.graphs == 2
    stock = zoo.call("sdxl", zoo.build("sdxl"))
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call("sdxl", pipe), stock)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_guard_and_a_new_size_inside_a_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    costs.forget()
    backend = Backend()
    pipe = zoo.build("sd15")
    stock = zoo.call("sd15", pipe), zoo.call("sd15", pipe, grid=(1, 14, 10))
    fastdiff.enable(pipe, AtEdm(early_steps=0), strict=True)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    # what is asked here is that a graph asks, not which side of so small a model is faster
    monkeypatch.setattr(costs, "measure", lambda *_: costs.Verdict(0.001, 0.002))
    assert torch.equal(zoo.call("sd15", pipe), stock[0])
    assert torch.equal(zoo.call("sd15", pipe, grid=(1, 14, 10)), stock[1])
    assert any("whole (" in str(told) for told in counts(pipe).values())
    assert backend.graphs == 2
    costs.forget()
