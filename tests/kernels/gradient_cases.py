"""Gradients of random attention problems against float64, with a bound for every entry."""

from __future__ import annotations

import torch
from attention_cases import in_float64, poisoned
from torch import Tensor

from fastdiff.kernels.block_sparse_attention import block_sparse_attention
from fastdiff.kernels.block_sparse_attention.reference import block_of_token, kept_blocks

NAMES = ("query", "key", "value", "key_mean", "value_mean")


def towards(args: dict) -> tuple[Tensor, Tensor]:
    """Random gradients of the output and of LSE, in the precision of the inputs."""
    q = args["query"]
    g = torch.Generator().manual_seed(17)
    B, Sq, H, _ = q.shape
    out = torch.randn(q.shape, generator=g).to(q)
    lse = torch.promote_types(q.dtype, torch.float32)
    return out, torch.randn(B, H, Sq, generator=g).to(q.device, lse)


def gradients(args: dict, impl: str, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and, with a tail, of its means."""
    leaves = [args[name].detach().requires_grad_() for name in NAMES[:3]]
    args = {**args, **dict(zip(NAMES, leaves, strict=False))}
    if args["tail"] is not None:
        means = [x.detach().requires_grad_() for x in args["tail"][:2]]
        args["tail"] = (*means, *args["tail"][2:])
        leaves += means
    out, lse = block_sparse_attention(**args, return_lse=True, impl=impl)
    if grad_lse is None:
        return torch.autograd.grad(out, leaves, grad)
    # a query without keys has a constant LSE of -inf
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
    return torch.autograd.grad((out, lse), leaves, (grad.to(out), grad_lse.to(lse)))


def bounds(args: dict, grad: Tensor, grad_lse: Tensor | None, eps: float) -> list[Tensor]:
    """How far each entry of each gradient may be from the truth, all in float64.

    Rounded once to the inputs' dtype, half an `eps` each: the probabilities of the forward and the
    backward, the output, the gradients of scores, the result. Scores, LSE and sums are float32,
    a sum of n terms goes through n / 16 + 16 additions that may truncate.
    """
    q, k, v = (args[name].nan_to_num().double().transpose(1, 2) for name in NAMES[:3])
    groups, keys = q.shape[1] // k.shape[1], k.shape[2]
    scale = q.shape[-1] ** -0.5
    NK = args["key_offsets"].numel() - 1
    kept = kept_blocks(args["indices"], args["counts"], NK)
    rows = block_of_token(args["query_offsets"], q.shape[2])
    seen = kept[:, :, rows][..., block_of_token(args["key_offsets"], keys)]
    if args["key_mask"] is not None:
        seen = seen & args["key_mask"][:, None, None]
    bias = torch.zeros_like(seen, dtype=torch.float64).masked_fill_(~seen, -torch.inf)
    if args["tail"] is not None:
        key_mean, value_mean, weight, keep = args["tail"]
        k, v = torch.cat((k, key_mean.double()), 2), torch.cat((v, value_mean.double()), 2)
        pooled = weight.double().log()[:, None, None].masked_fill(keep[:, :, rows], -torch.inf)
        bias = torch.cat((bias, pooled), -1)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * scale + bias
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()
    do = grad.double().transpose(1, 2)
    o, dp = p @ v, do @ v.mT
    delta = (o * do).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.double()[..., None]

    single = torch.finfo(torch.float32).eps
    half = eps / 2
    added = single * (max(q.shape[2] * groups, k.shape[2], q.shape[3]) / 16 + 16)
    # relative error of a probability: of its score and of its row's LSE
    size = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1)[:, :, None] * scale
    of_p = 8 * single * (1 + size + lse.masked_fill(lse == -torch.inf, 0).abs())
    of_delta = ((half + added) * (o.abs() + p @ v.abs()) * do.abs()).sum(-1, keepdim=True)
    of_ds = (half + of_p + added) * (dp - delta).abs() + of_delta + added * (do.abs() @ v.mT.abs())
    ds, of_ds = (p * (dp - delta)).abs(), p * of_ds
    of_dq = scale * (of_ds + added * ds) @ k.abs() + half * scale * ds @ k.abs()
    of_dk = scale * (of_ds + added * ds).mT @ q.abs() + half * scale * ds.mT @ q.abs()
    of_dv = (p * (2 * half + of_p + added)).mT @ do.abs()
    of_dk, of_dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_dk, of_dv))
    found = [of_dq, of_dk[:, :, :keys], of_dv[:, :, :keys]]
    found = [x.transpose(1, 2) for x in found]
    return found if args["tail"] is None else [*found, of_dk[:, :, keys:], of_dv[:, :, keys:]]


def check_gradients(args: dict, impl: str, with_lse: bool = True) -> dict[str, float]:
    """Compare `impl` with the reference in float64; the largest error of each over its bound."""
    grad, grad_lse = towards(args)
    if not with_lse:
        grad_lse = None
    truth = gradients(in_float64(args), "reference", grad.double(), grad_lse)
    eager = gradients(args, "reference", grad, grad_lse)
    with poisoned():
        found = gradients(args, impl, grad, grad_lse)
    # Triton's interpreter cuts bfloat16 off where hardware rounds
    cut = impl == "triton" and not grad.is_cuda and grad.dtype == torch.bfloat16
    allowed = bounds(args, grad, grad_lse, torch.finfo(grad.dtype).eps * (2 if cut else 1))
    shares = {}
    for name, x, true, low, bound in zip(NAMES, found, truth, eager, allowed, strict=False):
        assert x.dtype == args["query"].dtype and x.shape == true.shape, name
        assert not x.isnan().any(), f"NaN in the gradient of {name}"
        own = (low.double() - true).abs().max() if low.numel() else 0
        over = (x.double() - true).abs() / (own + bound + 1e-30)
        shares[name] = over.max().item() if x.numel() else 0.0
        assert shares[name] <= 1, f"error of {name} is {shares[name]:.3g} of what is allowed"
    return shares
