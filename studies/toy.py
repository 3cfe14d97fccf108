"""Toy: how five optimizers walk over the two-dimensional loss of the Sophia paper (figure 2).

    L(theta) = 8 (theta_1 - 1)^2 (1.3 theta_1^2 + 2 theta_1 + 1) + (theta_2 - 4)^2 / 2

Its minimum is (1, 4). Gradient descent, SignGD and Adam take steps small enough for theta_1 and are slow along theta_2,
Newton walks to a saddle, and Sophia's clipped steps arrive. Curvature is the exact Hessian diagonal, at every step.
"""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lion import Lion
from sophia import SophiaH

START = (0.2, 0.0)
MINIMUM = (1.0, 4.0)
STEPS = 30


def loss(theta: Tensor) -> Tensor:
    """The loss at theta (2,), a scalar."""
    one, two = theta
    return 8 * (one - 1) ** 2 * (1.3 * one**2 + 2 * one + 1) + (two - 4) ** 2 / 2


def hessian_diagonal(theta: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, theta.detach()).diagonal()


class Newton(torch.optim.Optimizer):
    """theta <- theta - g / h: what Sophia is without clipping and without care for negative curvature."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for theta in group["params"]:
                theta -= theta.grad / hessian_diagonal(theta)


# The learning rates of the first three are about the largest that do not diverge or keep jumping along theta_1.
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "gradient descent": lambda params: torch.optim.SGD(params, lr=0.015),
    "SignGD": lambda params: Lion(params, lr=0.1, betas=(0.0, 0.0)),  # Lion without momentum
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.9, 0.99)),
    "Newton": lambda params: Newton(params, {}),
    "Sophia": lambda params: SophiaH(params, lr=1.0, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0),
}


def walk(name: str, steps: int = STEPS) -> Tensor:
    """The points, (steps + 1, 2), that an optimizer visits."""
    theta = torch.nn.Parameter(torch.tensor(START))
    optimizer = OPTIMIZERS[name]([theta])
    points = [theta.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta).backward()
        if isinstance(optimizer, SophiaH):
            optimizer.update_hessian([hessian_diagonal(theta)])
        optimizer.step()
        points.append(theta.detach().clone())
    return torch.stack(points)


def figure() -> Figure:
    drawing = Figure(figsize=(7, 6), layout="constrained")
    axes = drawing.subplots()
    one, two = torch.meshgrid(torch.linspace(-0.9, 1.5, 200), torch.linspace(-0.5, 5, 200), indexing="xy")
    axes.contour(one, two, loss(torch.stack((one, two))), levels=30, colors="gray", linewidths=0.4)
    for name in OPTIMIZERS:
        axes.plot(*walk(name).T, marker="o", markersize=3, linewidth=1.2, label=name)
    axes.plot(*MINIMUM, marker="*", markersize=16, color="black", linestyle="", label="minimum")
    axes.set(xlabel="θ₁", ylabel="θ₂", xlim=(-0.9, 1.5), ylim=(-0.5, 5), title=f"{STEPS} steps from {START}")
    axes.legend(loc="center left")
    return drawing
