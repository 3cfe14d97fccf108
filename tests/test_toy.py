"""The two-dimensional example of the paper: clipped Newton steps arrive where the others do not."""

import pytest
import torch

from studies import toy

MINIMUM = torch.tensor(toy.MINIMUM)
FIRST_ORDER = ("gradient descent", "SignGD", "Adam")


def test_the_hessian_diagonal_is_the_losss():
    theta = torch.tensor([0.3, 1.0], dtype=torch.float64)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-4
        second_difference = (toy.loss(theta + step) - 2 * toy.loss(theta) + toy.loss(theta - step)) / 1e-8
        assert toy.hessian_diagonal(theta)[i] == pytest.approx(second_difference.item(), rel=1e-5)


def test_sophia_is_at_the_minimum_in_five_steps_and_the_others_never():
    """Newton ends in a saddle; first-order methods are slow along the flat direction."""
    away = {name: (toy.walk(name) - MINIMUM).norm(dim=1) for name in ("Sophia", "Newton", *FIRST_ORDER)}
    assert away["Sophia"][5] < 1e-3
    assert all(away[name][-1] > 0.9 for name in away if name != "Sophia")
    saddle = toy.walk("Newton")[-1].requires_grad_()
    assert torch.autograd.grad(toy.loss(saddle), saddle)[0].norm() < 1e-3
    assert toy.hessian_diagonal(saddle).min() < 0
