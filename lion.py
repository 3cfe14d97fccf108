"""Lion: sign updates with two momentum coefficients (Chen et al., 2023, arXiv 2302.06675), in one file."""

import functools
import math
from collections.abc import Callable

import torch


class Lion(torch.optim.Optimizer):
    """Lion, the paper's algorithm 2.

        theta <- theta - lr * weight_decay * theta
        theta <- theta - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    params: parameters or parameter groups. lr: the step of every coordinate, a number or a tensor; its authors advise
    3 to 10 times less than AdamW's, and as many times more weight decay. compile: fuse the update with torch.compile;
    float32 numbers are the same up to rounding. State: `exp_avg`. Raises ValueError for a hyperparameter out of its
    range, for parameters, gradients and state that do not fit, and RuntimeError for sparse ones.
    """

    def __init__(self, params, lr=1e-4, betas=(0.95, 0.98), weight_decay=0.0, *, compile=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._compile = compile

    def __setstate__(self, state):
        _check(state["state"], state["param_groups"])
        super().__setstate__(state)
        self.__dict__.setdefault("_compile", False)  # a copied or unpickled optimizer takes the plain path

    def add_param_group(self, param_group):
        group = self.defaults | param_group
        numbers = {name: group[name] for name in ("lr", "weight_decay")}
        numbers["betas[0]"], numbers["betas[1]"] = group["betas"]
        for name, value in numbers.items():
            high = 1 if name.startswith("betas") else math.inf
            if not 0 <= value < high:
                raise ValueError(f"{name} must be in [0, {high}), not {value}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        _check(self.state, self.param_groups)
        # A compiled update takes 0-d tensors: a number would be baked in and compiled anew when it changes.
        number = functools.partial(torch.as_tensor, dtype=torch.float64, device="cpu") if self._compile else float
        groups = []
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            lists = params, [param.grad for param in params], [self.state[param]["exp_avg"] for param in params]
            groups.append((*lists, *map(number, (group["lr"], *group["betas"], group["weight_decay"]))))
        update = _compiled(_lion_update) if self._compile else _lion_update
        update(groups)
        return loss


def _check(state: dict, groups: list[dict]) -> None:
    """Raise, before anything changes, for what an update cannot use."""
    for group in groups:
        if missing := {"lr", "betas", "weight_decay"} - group.keys():
            raise ValueError(f"a parameter group lacks {', '.join(sorted(missing))}: it is another optimizer's")
    for number, param in enumerate(param for group in groups for param in group["params"]):
        if not param.is_floating_point():
            raise ValueError(f"parameter {number} is {param.dtype}: only real floating-point ones can be trained")
        known = state.get(param) or {"exp_avg": None}
        if known.keys() != {"exp_avg"}:
            raise ValueError(f"the state of parameter {number} is {', '.join(known)}: it is another optimizer's")
        tensors = {"gradient": param.grad, **known}
        for what, value in ((what, value) for what, value in tensors.items() if value is not None):
            if value.layout is not torch.strided:
                raise RuntimeError(f"{what} {number} is sparse: make it dense (Embedding(..., sparse=False))")
            if value.shape != param.shape or value.dtype != param.dtype:
                theirs, ours = (f"{x.dtype} {tuple(x.shape)}" for x in (value, param))
                raise ValueError(f"{what} {number} is {theirs}, its parameter {ours}")


@functools.cache
def _compiled(update: Callable) -> Callable:
    return torch.compile(update, dynamic=False)


def _lion_update(groups: list[tuple]) -> None:
    for params, grads, exp_avgs, lr, beta1, beta2, weight_decay in groups:
        updates = torch._foreach_mul(exp_avgs, beta1)
        torch._foreach_add_(updates, torch._foreach_mul(grads, 1 - beta1))
        torch._foreach_sign_(updates)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_mul_(updates, lr)
        torch._foreach_sub_(params, updates)
        torch._foreach_mul_(exp_avgs, beta2)
        torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, 1 - beta2))
