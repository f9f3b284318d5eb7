"""What a user has set in torch does not reach into a method: default dtype, default device."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import contextlib

import pytest
import torch
import zoo

import fastdiff
from fastdiff import layout, policies
from fastdiff.method import Method


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {"half precision": lambda: default_dtype(torch.bfloat16),
            # whatever names no device is made there, and cannot be mixed with anything
            "another device": lambda: torch.device("meta")}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def captured(name):
    """A denoiser, and the arguments of its first call."""
    pipe, calls = zoo.build(name), []
    model = zoo.denoiser(pipe)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    zoo.call(name, pipe)
    hook.remove()
    return model.requires_grad_(False), *calls[0]


def same_under(setting, model, args, kwargs, *methods, **options):
    found = []
    for around in (contextlib.nullcontext, SETTINGS[setting]):
        layout.forget()
        handle = fastdiff.enable(model, *methods, **options)
        with around():
            out = model(*args, **kwargs)
        found.append(out[0] if isinstance(out, tuple) else out.sample)
        told = handle.report.summary()
        fastdiff.disable(model)
    assert torch.equal(*found)
    return told


# sparse-vdit wants a plan
ATTENTION = [*((name, {}) for name in sorted(policies.methods().keys() - {"sparse-vdit"})),
             ("neighborhood", {"path": "gathered"})]


@each_setting
@pytest.mark.parametrize("name, changes", ATTENTION)
def test_attention_methods(name, changes, setting):
    told = same_under(setting, *captured("wan"), name, **zoo.small_options("wan"), **changes)
    assert told["sparse_calls"] > 0


@each_setting
@pytest.mark.parametrize("model", ["flux", "sdxl"])
def test_text_and_pictures(model, setting):
    told = same_under(setting, *captured(model), "tile-sparse", **zoo.small_options(model))
    assert told["sparse_calls"] > 0


TOKENS: list[tuple[str, Method]] = [
    ("sdxl", fastdiff.AtEdm(guard=False, early_steps=0)),
    ("sd15", fastdiff.AtEdm(guard=False, early_steps=0, recover="increment")),
    ("sdxl", fastdiff.ZeroTPrune(guard=False)),
    ("sdxl", fastdiff.ToMe()),
    ("sdxl", fastdiff.KVDownsample(min_tokens=0, guard=False)),
    ("wan", fastdiff.KVDownsample(min_tokens=0, guard=False)),
]


@each_setting
@pytest.mark.parametrize("model, method", TOKENS, ids=lambda x: getattr(x, "name", x))
def test_token_methods(model, method, setting):
    told = same_under(setting, *captured(model), method, strict=True)
    assert told["methods"][method.name]
