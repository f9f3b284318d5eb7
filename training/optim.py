"""Muon for the layer matrices with AdamW for the rest, and a moving average of the weights."""

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [N, R, C], by a quintic Newton-Schulz loop."""
    x = g.to(torch.bfloat16) if g.is_cuda else g
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(1, 2) if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, batched over matrices of one shape (Jordan et al. 2024)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                self._update(group, params, max(shape))

    def _update(self, group: dict, params: list[Tensor], edge: int) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        moments = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, moments, group["momentum"])
        updates = orthogonalise(torch.stack(nesterov))
        # the factor gives updates the root mean square that AdamW's typically have
        lr = group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["decay"])
        torch._foreach_add_(params, list(updates.unbind(0)), alpha=-lr * 0.2 * edge**0.5)


def _is_layer_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes it: matrices within layers, but not those that make modulations."""
    return "blocks." in name and p.ndim == 2 and "norm" not in name


class Optimizer:
    """Both optimisers of the denoiser behind one `step(scale)`."""

    def __init__(self, model: nn.Module, config: dict):
        matrices = [p for n, p in model.named_parameters() if _is_layer_matrix(n, p)]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, config["muon_lr"], decay=config["decay"]),
            torch.optim.AdamW(
                others,
                config["adam_lr"],
                betas=(0.9, 0.98),
                weight_decay=0.0,
                fused=others[0].is_cuda,
            ),
        ]
        self.rates = [config["muon_lr"], config["adam_lr"]]

    def step(self, scale: float) -> None:
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of a module's parameters, with a warm-up of its horizon."""

    def __init__(self, model: nn.Module, decay: float):
        self.names = [name for name, _ in model.named_parameters()]
        self.params = [p.detach() for p in model.parameters()]
        self.values = [p.clone() for p in self.params]
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, self.params, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])
        self.steps = 10**6
