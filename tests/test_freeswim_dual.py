"""The dual path against a plain implementation of it that always runs both rows, and its rules."""

# the zoo's models are of diffusers, whose attributes are not typed
# pyright: basic

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import zoo

from fastdiff.clock import StepClock
from fastdiff.method import Part
from fastdiff.pipelines.families import family_of
from fastdiff.pipelines.upscale.cache import GuideCache, choose_place
from fastdiff.pipelines.upscale.dual import DualPath, Sizes, Ways
from fastdiff.pipelines.upscale.joint import merge, text_part
from fastdiff.pipelines.upscale.turn import Turn
from fastdiff.policies.inward_window import inward_axis, trained_window

MULT = 1.0461
# a target of 3 x 8 x 10 tokens for a model trained on 4 x 5
NATIVE, TARGET, GRID = (64, 80), (128, 160), (3, 8, 10)


@contextmanager
def dual(model, mode="cache", interval=2, slide="token", native=NATIVE, place="device",
         batched=False, target=TARGET, cross=True, mult=MULT):
    clock = StepClock()
    clock.begin(35)
    counted = []
    path = DualPath(Ways(mode, interval, slide, mult), Sizes(native, target, 16), clock,
                    GuideCache(place, lambda where: None), cross, lambda: batched, counted.append)
    with path.entered({"transformer": Part(model, family_of(model))}):
        yield clock, path, counted


def inputs(seed, rows=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, *(GRID[0], 2 * GRID[1], 2 * GRID[2]), generator=generator)
    text = torch.randn(rows, 24, 32, generator=generator)
    return {"hidden_states": x, "timestep": torch.full((rows,), 700), "encoder_hidden_states": text}


@torch.no_grad()
def forward(model, arguments):
    return model(**arguments, return_dict=False)[0]


class Released:
    """The dual path as first published: batch 2 in every pass, row 0 windows, row 1 dense."""

    def __init__(self, model, native=NATIVE):
        self.model = copy.deepcopy(model)
        self.kind, self.kept = "guide", {}
        height, width = trained_window((native[0] // 16, native[1] // 16))
        keeps = []
        for size, window in zip(GRID[1:], (height, width), strict=True):
            axis, place = inward_axis(size, window), torch.arange(size)
            keeps.append((axis.low[:, None] <= place) & (place < axis.high[:, None]))
        plane = (keeps[0][:, None, :, None] & keeps[1][None, :, None, :]).flatten(2).flatten(0, 1)
        self.mask = plane.repeat(GRID[0], GRID[0])
        for number, block in enumerate(self.model.blocks):
            block.attn1.forward = lambda *a, m=block.attn1: self.own(m, *a)
            block.attn2.forward = lambda *a, m=block.attn2, n=number: self.text(m, n, *a)

    def __call__(self, kind, arguments):
        self.kind = kind
        both = {name: torch.cat([x, x]) for name, x in arguments.items()}
        return forward(self.model, both)[:1]

    def heads(self, attn, hidden, other):
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(other)), attn.to_v(other)
        return (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))

    def own(self, attn, hidden, _, __, rotary):
        q, k, v = self.heads(attn, hidden, hidden)
        cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]

        def turned(x):
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        q, k, v = (x.transpose(1, 2) for x in (turned(q), turned(k), v))
        scale = MULT / q.shape[-1] ** 0.5
        window = F.scaled_dot_product_attention(q[:1], k[:1], v[:1], self.mask, scale=scale)
        full = window
        if self.kind == "guide":
            full = F.scaled_dot_product_attention(q[1:], k[1:], v[1:], scale=scale)
        return attn.to_out[0](torch.cat([window, full]).transpose(1, 2).flatten(2))

    def text(self, attn, number, hidden, words, *_):
        q, k, v = self.heads(attn, hidden, words)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.kind == "guide":
            self.kept[number] = found[1:]
        if self.kind != "window":
            found = self.kept[number].expand(2, -1, -1)
        return attn.to_out[0](found)


@pytest.mark.parametrize("place", ["device", "host"])
def test_every_pass_equals_the_released_one(place):
    model = zoo.build("wan").transformer
    released = Released(model)
    with dual(model, place=place) as (clock, _, counted):
        for step, kind in enumerate(("guide", "reuse", "guide", "reuse")):
            clock.step, arguments = step, inputs(step)
            clock.branch = "cond"
            zoo.assert_near(forward(model, arguments), released(kind, arguments))
            clock.branch = "uncond"
            zoo.assert_near(forward(model, arguments), released("window", arguments))
    assert counted == [f"{kind} passes" for kind in ("guide", "window", "reuse", "window") * 2]


def test_nocache_guides_both_branches_in_every_step():
    model = zoo.build("wan").transformer
    released = Released(model)
    with dual(model, mode="nocache") as (clock, _, counted):
        for step, branch in ((0, "cond"), (0, "uncond"), (1, "cond")):
            clock.step, clock.branch = step, branch
            arguments = inputs(5 + step)
            zoo.assert_near(forward(model, arguments), released("guide", arguments))
    assert set(counted) == {"guide passes"}


def test_the_override_is_the_same_in_both_rows_bit_for_bit():
    model = zoo.build("wan").transformer
    layers = len(model.blocks)
    for mode in ("nocache", "cache"):
        seen = []
        with dual(model, mode=mode, slide="tile") as (clock, _, _):
            clock.branch = "cond"
            hooks = [block.attn2.register_forward_hook(lambda m, a, out, s=seen: s.append(out))
                     for block in model.blocks]
            forward(model, inputs(1))
            for hook in hooks:
                hook.remove()
        # a guide that is kept goes first and alone
        rows = seen if mode == "nocache" else [
            torch.cat(pair) for pair in zip(seen[:layers], seen[layers:], strict=True)]
        assert len(rows) == layers
        for out in rows:
            assert out.shape[0] == 2 and torch.equal(out[0], out[1])


def test_windows_as_large_as_the_grid_are_dense_with_the_scale():
    model = zoo.build("wan").transformer
    rows = []
    with dual(model, mode="nocache", native=TARGET, slide="tile") as (clock, _, _):
        clock.branch = "cond"
        hooks = [block.register_forward_hook(lambda m, a, out: rows.append(out))
                 for block in model.blocks]
        guided = forward(model, inputs(2))
        for hook in hooks:
            hook.remove()
    # rows stay one through all blocks
    for out in rows:
        torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-6)
    with dual(model, mode="window", native=TARGET) as _:
        zoo.assert_near(guided, forward(model, inputs(2)))
    with dual(model, mode="window", native=TARGET, mult=1.0) as _:
        plain = forward(model, inputs(2))
    assert torch.equal(plain, forward(model, inputs(2)))
    assert not torch.allclose(plain, guided, atol=1e-7)


def test_cond_of_cache_one_is_that_of_nocache():
    model = zoo.build("wan").transformer
    found = []
    for mode in ("cache", "nocache"):
        with dual(model, mode=mode, interval=1) as (clock, _, _):
            clock.step, clock.branch = 3, "cond"
            found.append(forward(model, inputs(9)))
            clock.branch = "uncond"
            found.append(forward(model, inputs(9)))
    # one after the other, or in one batch
    zoo.assert_near(found[0], found[2])
    assert not torch.allclose(found[1], found[3], atol=1e-4)


@pytest.mark.parametrize("interval", [35, 50])
def test_dense_attention_runs_once_with_a_long_interval(interval):
    model = zoo.build("wan").transformer
    with dual(model, interval=interval) as (clock, _, counted):
        for step in range(35):
            clock.step = step
            for branch in ("cond", "uncond"):
                clock.branch = branch
                forward(model, inputs(0))
    assert counted[0] == "guide passes" and counted.count("guide passes") == 1
    assert counted.count("reuse passes") == 34 and counted.count("window passes") == 35


def test_no_room_to_keep_the_guide_means_a_guide_in_every_step():
    model = zoo.build("wan").transformer
    released = Released(model)
    with dual(model, place="none") as (clock, _, counted):
        for step in range(3):
            clock.step, clock.branch = step, "cond"
            zoo.assert_near(forward(model, inputs(step)), released("guide", inputs(step)))
    assert counted == ["guide passes"] * 3


def test_an_expert_never_takes_the_guide_of_another():
    first, second = zoo.build("wan").transformer, zoo.build("wan", seed=1).transformer
    clock, counted = StepClock(), []
    clock.begin(10)
    path = DualPath(Ways("cache", 5, "token", MULT), Sizes(NATIVE, TARGET, 16), clock,
                    GuideCache("device", lambda where: None), True, lambda: False, counted.append)
    models = {"transformer": first, "transformer_2": second}
    with path.entered({name: Part(m, family_of(m)) for name, m in models.items()}):
        clock.branch = "cond"
        for step, model in enumerate((first, first, second, second)):
            clock.step = step
            out = forward(model, inputs(step))
        assert len(path.cache._kept) == len(second.blocks)
    assert counted == [f"{kind} passes" for kind in ("guide", "reuse", "guide", "reuse")]
    released = Released(second)
    released("guide", inputs(2))
    zoo.assert_near(out, released("reuse", inputs(3)))


def test_rows_of_both_guidance_branches_in_one_forward():
    """The unconditional half has windows alone, the other half the guide, as in two forwards."""
    model = zoo.build("wan").transformer
    arguments = inputs(4, rows=2)
    parts = [{name: x[i : i + 1] for name, x in arguments.items()} for i in range(2)]
    with dual(model, batched=True, slide="tile") as (clock, _, counted):
        together = []
        for step in range(2):
            clock.step = step
            together.append(forward(model, arguments))
    assert counted == ["guide passes", "reuse passes"]
    with dual(model, slide="tile") as (clock, _, _):
        for step in range(2):
            clock.step = step
            for i, branch in enumerate(("uncond", "cond")):
                clock.branch = branch
                zoo.assert_near(together[step][i : i + 1], forward(model, parts[i]))


def test_a_batch_of_two_is_two_runs():
    model = zoo.build("wan").transformer
    arguments = inputs(4, rows=2)
    with dual(model, slide="tile") as (clock, _, _):
        clock.branch = "cond"
        for step in range(2):
            clock.step = step
            both = forward(model, arguments)
    for i in range(2):
        with dual(model, slide="tile") as (clock, _, _):
            clock.branch = "cond"
            for step in range(2):
                clock.step = step
                one = forward(model, {name: x[i : i + 1] for name, x in arguments.items()})
        zoo.assert_near(both[i : i + 1], one)


def wan_i2v():
    torch.manual_seed(0)
    return zoo.wan_transformer(image_dim=40, added_kv_proj_dim=48).eval().requires_grad_(False)


def test_picture_tokens_keep_each_rows_own_query():
    """Wan I2V: the text part alone is overridden, before the output projection."""
    model = wan_i2v()
    arguments = inputs(6)
    arguments["encoder_hidden_states"] = torch.randn(1, 512, 32)
    arguments["encoder_hidden_states_image"] = torch.randn(1, 7, 40)
    attn, seen, outs = model.blocks[1].attn2, [], []
    with dual(model) as (clock, _, _):
        clock.branch = "cond"
        hooks = [
            attn.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]),
                                           with_kwargs=True),
            attn.register_forward_hook(lambda m, args, out: outs.append(out))]
        for clock.step in range(2):
            forward(model, arguments)
        for hook in hooks:
            hook.remove()
    # the guide, the windows of the same step, the windows of the next
    assert [out.shape[0] for out in outs] == [1, 1, 1]
    hidden = torch.cat(seen[1::-1])
    emb = model.condition_embedder
    pictures = emb.image_embedder(arguments["encoder_hidden_states_image"])
    words = emb.text_embedder(arguments["encoder_hidden_states"])

    def heads(x):
        return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

    q = heads(attn.norm_q(attn.to_q(hidden)))
    k, v = heads(attn.norm_k(attn.to_k(words))), heads(attn.to_v(words))
    ki = heads(attn.norm_added_k(attn.add_k_proj(pictures)))
    vi = heads(attn.add_v_proj(pictures))
    text = F.scaled_dot_product_attention(q[1:], k, v).expand(2, -1, -1, -1)
    own = F.scaled_dot_product_attention(q, ki.expand(2, -1, -1, -1), vi.expand(2, -1, -1, -1))
    wanted = attn.to_out[0]((text + own).transpose(1, 2).flatten(2))
    zoo.assert_near(torch.cat(outs[1::-1]), wanted)


@pytest.mark.parametrize("padded", [0, 5])
def test_joint_attention_is_one_softmax_out_of_two(padded):
    """Text part and window part merge to attention over both; the mask hides padded text."""
    q, k, v = torch.randn(3, 2, 40, 3, 8, dtype=torch.float64)
    text_k, text_v = torch.randn(2, 2, 11, 3, 8, dtype=torch.float64)
    mask = torch.arange(11) < 11 - padded
    mask = mask.expand(2, -1)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) / 8**0.5
    window = (torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1))
    found = merge(window, text_part(q, text_k, text_v, mask, None))
    everything = F.scaled_dot_product_attention(
        q.transpose(1, 2), torch.cat([k, text_k], 1).transpose(1, 2),
        torch.cat([v, text_v], 1).transpose(1, 2),
        attn_mask=torch.cat([torch.ones(2, 40, dtype=torch.bool), mask], 1)[:, None, None])
    torch.testing.assert_close(found, everything.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_rows_of_a_turn():
    guide = Turn("guide", rows=4, first=2)
    x = torch.arange(4)
    assert guide.batch == 6
    extended = guide.extended({"hidden_states": x, "img_ids": x, "more": {"time_ids": x}, "n": 3})
    assert extended["hidden_states"].tolist() == [0, 1, 2, 3, 2, 3]
    assert extended["img_ids"] is x and extended["n"] == 3
    assert extended["more"]["time_ids"].tolist() == [0, 1, 2, 3, 2, 3]
    whole = extended["hidden_states"]
    assert guide.own(whole).tolist() == [0, 1, 2, 3]
    assert guide.spread(whole[:2], whole[4:]).tolist() == [0, 1, 2, 3, 2, 3]
    reuse = Turn("reuse", rows=4, first=2)
    assert reuse.own(x).tolist() == [0, 1]
    assert reuse.spread(x[:2], x[2:]).tolist() == [0, 1, 2, 3]
    record = Turn("record", rows=4)
    assert record.own((x, None, 3)) == (x, None, 3)
    assert record.spread(x[:0], x) is x


@pytest.mark.parametrize("place", ["device-8-bit", "host-8-bit"])
def test_a_byte_a_number_is_near(place):
    cache = GuideCache(place, lambda where: None)
    x, lse = torch.randn(2, 50, 3, 16), torch.randn(2, 50, 3)
    cache.put(7, (x, lse))
    near, same = cache.get(7, x.device)
    assert torch.equal(same, lse)
    most = x.abs().amax(-1, keepdim=True)
    assert ((near - x).abs() <= most / 254 * 1.01).all()
    assert cache._kept[7].parts[0].dtype == torch.int8


def test_the_guide_is_kept_where_there_is_room():
    gib = 2.0**30
    entry = {"one": 0.5 * gib, "layers": 30, "element": 2}
    assert choose_place(**entry, device=80 * gib, host=100 * gib) == "device"
    assert choose_place(**entry, device=24 * gib, host=100 * gib) == "host"
    assert choose_place(**entry, device=28 * gib, host=4 * gib) == "device-8-bit"
    assert choose_place(**entry, device=8 * gib, host=12 * gib) == "host-8-bit"
    assert choose_place(**entry, device=8 * gib, host=4 * gib) == "none"


def test_a_part_of_a_tensor_does_not_keep_all_of_it():
    cache = GuideCache("device", lambda where: None)
    whole = torch.randn(4, 10, 8)
    cache.put(1, (whole[2:],))
    kept = cache.get(1, whole.device)[0]
    assert torch.equal(kept, whole[2:]) and kept.untyped_storage().nbytes() == 2 * 10 * 8 * 4
