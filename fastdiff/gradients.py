"""Training through the op: plain autograd where Python runs, a pair of ops in a compiled graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.attention import attend

# not `custom_op`: that runs its body below autograd, and here the body records a graph of its own
_library = torch.library.Library("fastdiff", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? ids, "
    "Tensor layer, SymInt[] layout, float? scale, str backend) -> (Tensor, Tensor)", tags=_tags)
_library.define(
    "attention_backward(Tensor grad, Tensor ticket, SymInt[] query, SymInt[] key, SymInt[] value) "
    "-> (Tensor, Tensor, Tensor)", tags=_tags)


def attention_with_gradients(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`fastdiff::attention` with gradients for query, key and value; the same arguments."""
    if torch.compiler.is_compiling():
        return _Compiled.apply(query, key, value, *rest)
    return attend(query, key, value, *rest)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        output, ticket = torch.ops.fastdiff.attention_forward(query, key, value, *rest)
        ctx.save_for_backward(ticket)
        ctx.shapes = (query.shape, key.shape, value.shape)
        ctx.constants = len(rest)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (ticket,) = ctx.saved_tensors
        found = torch.ops.fastdiff.attention_backward(grad, ticket, *ctx.shapes)
        return (*found, *[None] * ctx.constants)


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd as in plain Python; compiled code runs its ops below it."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The output, and a ticket: a tensor that carries the recorded graph to the backward.

    The graph hangs on the ticket's Python object, which torch keeps for as long as the tensor; it
    dies with it, also where no backward ever comes.
    """
    with _recording():
        q, k, v = leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = attend(q, k, v, *rest)
    ticket = torch.zeros((), dtype=torch.int64)
    setattr(ticket, "recorded", (output, leaves))  # noqa: B010 - a tensor declares no such name
    return output.detach().contiguous(), ticket


def _backward(
    grad: Tensor, ticket: Tensor, query: Sequence[int], key: Sequence[int], value: Sequence[int]
) -> tuple[Tensor, ...]:
    output, leaves = getattr(ticket, "recorded")  # noqa: B009
    with _recording():
        found = torch.autograd.grad(output, leaves, grad)
    return tuple(x.contiguous() for x in found)


for _name, _body in (("attention_forward", _forward), ("attention_backward", _backward)):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastdiff::attention_forward", lib=_library)
def _(query, key, value, mask, ids, layer, layout, scale, backend):
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, torch.zeros((), dtype=torch.int64)


@torch.library.register_fake("fastdiff::attention_backward", lib=_library)
def _(grad, ticket, query, key, value):
    return tuple(grad.new_empty(shape) for shape in (query, key, value))
