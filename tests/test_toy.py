"""The two-dimensional example of the paper: clipped Newton steps arrive where the others do not."""

import pytest
import torch

from studies import toy

MINIMUM = torch.tensor(toy.MINIMUM)


def distances(name):
    return (toy.walk(name) - MINIMUM).norm(dim=1)


def test_the_hessian_diagonal_is_the_losss():
    theta = torch.tensor([0.3, 1.0], dtype=torch.float64)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-4
        second_difference = (toy.loss(theta + step) - 2 * toy.loss(theta) + toy.loss(theta - step)) / 1e-8
        assert toy.hessian_diagonal(theta)[i] == pytest.approx(second_difference.item(), rel=1e-5)


def test_sophia_reaches_the_minimum_in_five_steps():
    assert distances("Sophia")[5] < 1e-3


def test_newton_ends_in_a_saddle():
    end = toy.walk("Newton")[-1].requires_grad_()
    gradient = torch.autograd.grad(toy.loss(end), end)[0]
    assert gradient.norm() < 1e-3
    assert toy.hessian_diagonal(end).min() < 0
    assert (end - MINIMUM).norm() > 0.9


@pytest.mark.parametrize("name", ["gradient descent", "SignGD", "Adam"])
def test_first_order_methods_are_slow_along_the_flat_direction(name):
    assert distances(name)[-1] > 0.9
