"""Lion: sign updates with two momentum coefficients (Chen et al., 2023, arXiv 2302.06675), in one file."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Lion(torch.optim.Optimizer):
    """Lion, the paper's algorithm 2.

        theta <- theta - lr * weight_decay * theta
        theta <- theta - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    params: parameters or parameter groups. lr: the step of every coordinate, a number or a tensor; its authors advise
    3 to 10 times less than AdamW's, and as many times more weight decay. compile: fuse the update with torch.compile;
    the numbers are the same. State: `exp_avg`. Raises ValueError for a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
        *,
        compile: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._compile = compile

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_compile", False)  # a copied or unpickled optimizer takes the plain path

    def add_param_group(self, param_group):
        group = self.defaults | param_group
        beta1, beta2 = group["betas"]
        for name, value, high in (
            ("lr", group["lr"], math.inf),
            ("betas[0]", beta1, 1),
            ("betas[1]", beta2, 1),
            ("weight_decay", group["weight_decay"], math.inf),
        ):
            if not 0 <= value < high:
                raise ValueError(f"{name} must be in [0, {high}), not {value}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = []
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            if any(param.grad.is_sparse for param in params):
                raise RuntimeError("Lion does not support sparse gradients")
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            exp_avgs = [self.state[param]["exp_avg"] for param in params]
            lr = group["lr"]
            # A compiled update takes lr as a 0-d tensor: a number would be baked in and compiled anew when it changes.
            lr = torch.as_tensor(lr, dtype=torch.float64, device="cpu") if self._compile else float(lr)
            groups.append(
                (params, [param.grad for param in params], exp_avgs, lr, *group["betas"], group["weight_decay"])
            )
        update = _compiled(_lion_update) if self._compile else _lion_update
        update(groups)
        return loss


@functools.cache
def _compiled(update: Callable) -> Callable:
    return torch.compile(update, dynamic=False)


def _lion_update(groups: list[tuple]) -> None:
    for params, grads, exp_avgs, lr, beta1, beta2, weight_decay in groups:
        updates = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_mul_(updates, lr)
        torch._foreach_sub_(params, updates)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)
