"""Sophia: a clipped, diagonal second-order optimizer (Liu et al., 2023, arXiv 2305.14342), in one file.

Every `hessian_interval` steps (the paper: 10, the first step included) estimate the Hessian's diagonal with
`gauss_newton_bartlett` (Sophia-G) or `hutchinson` (Sophia-H), hand it to `update_hessian`, then `step` as usual.

The update is that of the paper's later version, with its gamma called `rho` as in the released code:

    m <- beta1 * m + (1 - beta1) * g                  every step; no bias correction
    h <- beta2 * h + (1 - beta2) * estimate           at every estimate
    theta <- theta - lr * weight_decay * theta
    theta <- theta - lr * clip(m / max(rho * h, eps), 1)

Version 1 of the paper writes clip(m / max(h, eps), rho): its learning rate is lr / rho here. Its "rho = 20" for
Sophia-G belongs to another scale of the estimate; with the estimate below it is the 0.04 to 0.05 of the released code.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class _Sophia(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, rho, weight_decay, eps, compile):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "eps": eps})
        self._compile = compile

    def __setstate__(self, state):
        _check(state["state"], state["param_groups"])
        super().__setstate__(state)
        self.__dict__.setdefault("_compile", False)  # a copied or unpickled optimizer takes the plain path

    def add_param_group(self, param_group):
        group = self.defaults | param_group
        numbers = {name: group[name] for name in ("lr", "rho", "weight_decay")}
        numbers["betas[0]"], numbers["betas[1]"] = group["betas"]
        for name, value in numbers.items():
            high = 1 if name.startswith("betas") else math.inf
            if not 0 <= value < high:
                raise ValueError(f"{name} must be in [0, {high}), not {value}")
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"eps must be above 0, not {group['eps']}")
        super().add_param_group(param_group)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["hessian"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def update_hessian(self, estimate: Iterable[Tensor]) -> None:
        """Move the running Hessian diagonal towards `estimate` by 1 - betas[1], except where it is inf or NaN.

        estimate: one tensor for each of the optimizer's parameters, in their order and of their shapes. Call it
        before the `step` it is meant for. Raises as `step` does.
        """
        estimate = list(estimate)
        _check(self.state, self.param_groups, estimate)
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        for (group, param), value in zip(pairs, estimate, strict=True):
            hessian = self._state_of(param)["hessian"]
            value = value.to(hessian)
            hessian.lerp_(value.where(value.isfinite(), hessian), 1 - group["betas"][1])

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
            numbers = [number(value) for value in (group["lr"], group["betas"][0], group["rho"], group["weight_decay"])]
            for dtype in dict.fromkeys(param.dtype for param in group["params"]):
                params = [param for param in group["params"] if param.dtype == dtype and param.grad is not None]
                if not params:
                    continue
                states = [self._state_of(param) for param in params]
                exp_avgs, hessians = ([state[name] for state in states] for name in ("exp_avg", "hessian"))
                eps = number(max(group["eps"], torch.finfo(dtype).tiny))  # in float16 that of float32 would be 0
                eps = [eps] * len(params) if self._compile else eps  # on torch 2.11 shards take no list of numbers
                groups.append((params, [param.grad for param in params], exp_avgs, hessians, eps, *numbers))
        update = _compiled(_sophia_update) if self._compile else _sophia_update
        update(groups)
        return loss

    @torch.no_grad()
    def unclipped_fraction(self) -> float:
        """The share of coordinates with |m| < rho * h, whose last update was not clipped. Waits for the device."""
        counts, total = [], 0
        for group in self.param_groups:
            for state in (self.state[param] for param in group["params"] if param in self.state):
                count = (state["exp_avg"].abs() < group["rho"] * state["hessian"]).sum()
                counts.append(count.full_tensor() if is_sharded(count) else count)
                total += state["exp_avg"].numel()
        return float(sum(count.to(counts[0].device) for count in counts)) / max(total, 1)


class SophiaG(_Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator: pair it with `gauss_newton_bartlett`.

    params: parameters or parameter groups. lr: the largest step of a coordinate, a number or a tensor. betas: decay of
    the momentum a step, and of the Hessian diagonal an estimate. rho: the larger, the fewer coordinates are clipped.
    weight_decay: decoupled (times lr). eps: least denominator. compile: fuse the update with torch.compile (needs a
    C++ compiler on a CPU, Triton on a GPU); float32 numbers are the same up to rounding. State: `exp_avg` and
    `hessian`, like their parameter. Raises ValueError for a hyperparameter out of its range, for parameters, gradients
    and state that do not fit, and RuntimeError for sparse ones. Source: arXiv 2305.14342, algorithms 2 and 3.
    """

    def __init__(self, params, lr=6e-4, betas=(0.96, 0.99), rho=0.05, weight_decay=0.2, eps=1e-12, *, compile=False):
        super().__init__(params, lr, betas, rho, weight_decay, eps, compile)


class SophiaH(_Sophia):
    """Sophia with Hutchinson's estimator, `hutchinson`: algorithms 1 and 3. Arguments as for SophiaG."""

    def __init__(self, params, lr=6e-4, betas=(0.96, 0.99), rho=0.01, weight_decay=0.2, eps=1e-12, *, compile=False):
        super().__init__(params, lr, betas, rho, weight_decay, eps, compile)


def _check(state: dict, groups: list[dict], estimate: list[Tensor] | None = None) -> None:
    """Raise, before anything changes, for what an update cannot use."""
    for group in groups:
        if missing := {"lr", "betas", "rho", "weight_decay", "eps"} - group.keys():
            raise ValueError(f"a parameter group lacks {', '.join(sorted(missing))}: it is another optimizer's")
    params = [param for group in groups for param in group["params"]]
    if estimate is not None and len(estimate) != len(params):
        raise ValueError(f"the estimate has {len(estimate)} tensors, the optimizer {len(params)} parameters")
    for number, param in enumerate(params):
        if not param.is_floating_point():
            raise ValueError(f"parameter {number} is {param.dtype}: only real floating-point ones can be trained")
        known = state.get(param) or dict.fromkeys(("exp_avg", "hessian"))
        if known.keys() != {"exp_avg", "hessian"}:
            raise ValueError(f"the state of parameter {number} is {', '.join(known)}: it is another optimizer's")
        tensors = {"gradient": param.grad, "estimate": estimate and estimate[number], **known}
        for what, value in ((what, value) for what, value in tensors.items() if value is not None):
            if value.layout is not torch.strided:
                raise RuntimeError(f"{what} {number} is sparse: make it dense (Embedding(..., sparse=False))")
            if value.shape != param.shape or (value.dtype != param.dtype and what != "estimate"):
                theirs, ours = (f"{x.dtype} {tuple(x.shape)}" for x in (value, param))
                raise ValueError(f"{what} {number} is {theirs}, its parameter {ours}")


@functools.cache
def _compiled(update: Callable) -> Callable:
    return torch.compile(update, dynamic=False)


def _sophia_update(groups: list[tuple]) -> None:
    # Over whole lists: a few launches when eager, one pass over the memory when compiled.
    for params, grads, exp_avgs, hessians, eps, lr, beta1, rho, weight_decay in groups:
        torch._foreach_mul_(exp_avgs, beta1)
        torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, 1 - beta1))
        denominators = torch._foreach_mul(hessians, rho)
        torch._foreach_clamp_min_(denominators, eps)
        updates = torch._foreach_div(exp_avgs, denominators)
        torch._foreach_clamp_min_(updates, -1)
        torch._foreach_clamp_max_(updates, 1)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_mul_(updates, lr)
        torch._foreach_sub_(params, updates)


def sample_labels(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Labels drawn from softmax(logits): logits (..., V) of any floating dtype give int64 labels (...).

    For engines that need `.backward()` (DDP, FSDP2, DeepSpeed): take the gradient of the mean cross-entropy against
    these labels yourself; B * grad * grad, B the number of labels, is the estimate for `update_hessian`. Under float16
    take the gradient of the sum: grad * grad / B is the same, and the small gradients of a mean would be lost.
    """
    device = generator.device if generator is not None else logits.device
    uniforms = torch.rand(2, *logits.shape[:-1], generator=generator, dtype=torch.float32, device=device)
    return labels_from_uniforms(logits, uniforms.to(logits.device))


_VOCABULARY_BLOCK = 256


@torch.no_grad()
def labels_from_uniforms(logits: Tensor, uniforms: Tensor) -> Tensor:
    """`sample_labels` for given random numbers: logits (..., V), uniforms (2, ...) in [0, 1), labels (...).

    Inverts the cumulative distribution in two stages: the first number picks a block of the vocabulary by its share
    of the softmax, the second a token within the block. So no cumulative sum runs over the whole vocabulary, and
    rare tokens keep the full resolution of a uniform number. Raises ValueError for logits of fewer than 2 classes.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must be (..., V) with V, the classes, at least 2, not of shape {tuple(logits.shape)}")
    shape, V = logits.shape[:-1], logits.shape[-1]
    logits = logits.reshape(-1, V)  # (N, V)
    first, second = uniforms.reshape(2, -1, 1).to(torch.promote_types(logits.dtype, torch.float32))  # (N, 1) each
    W = min(_VOCABULARY_BLOCK, V)
    whole = V // W * W
    peak = logits.amax(dim=-1, keepdim=True).to(first.dtype)  # (N, 1)
    masses = (logits[:, :whole].unflatten(-1, (-1, W)) - peak.unsqueeze(-1)).exp().sum(dim=-1)  # (N, V // W)
    if whole < V:
        masses = torch.cat((masses, (logits[:, whole:] - peak).exp().sum(dim=-1, keepdim=True)), dim=-1)
    block = _invert_cdf(masses, first)  # (N, 1)
    tokens = block * W + torch.arange(W, device=logits.device)  # (N, W)
    inside = (logits.gather(-1, tokens.clamp_max(V - 1)) - peak).exp() * (tokens < V)
    return (block * W + _invert_cdf(inside, second)).reshape(shape)


def _invert_cdf(masses: Tensor, uniform: Tensor) -> Tensor:
    cumulative = masses.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # uniform * total may round up to total: the second condition keeps to the last index with a mass
    return ((cumulative <= uniform * total) & (cumulative < total)).sum(dim=-1, keepdim=True)


def gauss_newton_bartlett(
    logits: Tensor, params: Iterable[Tensor], generator: torch.Generator | None = None
) -> list[Tensor]:
    """An unbiased, never negative estimate of the Gauss-Newton matrix's diagonal of the mean cross-entropy.

    logits: (..., V), still attached to their graph, which is freed; every position counts, so leave out padding
    (`logits[mask]`). params: the tensors to estimate for. Returns one tensor for each: B * g * g, with B the number of
    positions and g the gradient of the mean cross-entropy against labels drawn from softmax(logits); zeros for a
    parameter that was not used or takes no gradient. With several processes average the estimates over them, or their
    weights drift apart. Source: arXiv 2305.14342, algorithm 2.
    """
    labels = sample_labels(logits.detach(), generator)
    wide = torch.promote_types(logits.dtype, torch.float32)
    # The sum's gradient is B * g: the mean's could underflow in float16.
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).to(wide), labels.flatten(), reduction="sum")
    return [gradient * (gradient / labels.numel()) for gradient in _gradients([loss], list(params))]


def hutchinson(loss: Tensor, params: Iterable[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """An unbiased estimate of the diagonal of the Hessian of `loss`; its entries may be negative.

    loss: a scalar that still carries its graph, which is freed. Fused attention has no second derivative: run the
    model inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. Returns u * (H u) for each of `params`, with
    u ~ N(0, I) drawn from `generator`; zeros for a parameter that was not used or takes no gradient. Under float16
    autocast give it the sum of the losses and divide the estimate by their number.
    Source: arXiv 2305.14342, algorithm 1.
    """
    params = list(params)
    if any(is_sharded(param) for param in params):
        raise ValueError("hutchinson does not work on sharded parameters (FSDP2): take sample_labels and .backward()")
    gradients = _gradients([loss], params, create_graph=True)
    directions = normal_like(params, generator)
    with_graph = [(g, u) for g, u in zip(gradients, directions, strict=True) if g.requires_grad]
    if not with_graph:  # a loss that is linear in every parameter
        return [torch.zeros_like(param) for param in params]
    try:
        products = _gradients([g for g, _ in with_graph], params, grad_outputs=[u for _, u in with_graph])
    except RuntimeError as error:
        if "scaled_dot_product" not in str(error):
            raise
        raise RuntimeError(
            "fused attention has no second derivative: compute the loss inside"
            " torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        ) from error
    return [u * product for u, product in zip(directions, products, strict=True)]


def _gradients(outputs: list[Tensor], params: list[Tensor], **options) -> list[Tensor]:
    """torch.autograd.grad, with zeros for a parameter that was not used or takes no gradient."""
    if not outputs[0].requires_grad:
        raise ValueError("the loss carries no graph: compute it with gradients enabled, and before any .backward()")
    options |= {"allow_unused": True, "materialize_grads": True}
    taking = [param for param in params if param.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, taking, **options) if taking else ())
    return [next(gradients) if param.requires_grad else torch.zeros_like(param) for param in params]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; not every build of torch has the class


def normal_like(params: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """One tensor of standard normal numbers for each of `params`, drawn in their order on the generator's device."""
    draws = []
    for param in params:
        device = generator.device if generator is not None else param.device
        draws.append(torch.randn(param.shape, dtype=param.dtype, device=device, generator=generator).to(param.device))
    return draws
