"""What a unit knows about an attribute: the formula, its gradient, and inputs at the edge."""

import math

import pytest
import torch

from demem.removal.information import attribute_information, group_moments, information_gradient


def _batch(size=40, units=5, classes=3, attributes=3):
    y, attribute = torch.randint(classes, (size,)), torch.randint(attributes, (size,))
    attribute[y == 0] = 1  # a class without a second attribute
    attribute[(y == 1) & (attribute == 2)] = 0  # and one without a third
    rows = torch.randn(size, units, dtype=torch.float64) + attribute[:, None] * torch.arange(units) + 3 * y[:, None]
    return rows, y, attribute


def _by_hand(rows, y, attribute, deviation, floor=0.1):
    """Mean over the classes with two attributes, one class, unit and group at a time."""
    kinds = {c: sorted(set(attribute[y == c].tolist())) for c in sorted(set(y.tolist()))}
    values = []
    for c in [c for c, found in kinds.items() if len(found) >= 2]:
        groups = [rows[(y == c) & (attribute == a)] for a in kinds[c]]
        means = torch.stack([g.mean(0) for g in groups])
        between = means.var(0, unbiased=False)
        within = sum((g - g.mean(0)).square().sum(0) for g in groups) / sum(map(len, groups))
        values.append(0.5 * (1 + between / (within + (floor * deviation).square())).log())
    return torch.stack(values).mean(0)


def test_the_information_is_that_of_the_formula():
    rows, y, attribute = _batch()
    deviation = rows.std(0)
    information, _ = information_gradient(rows, y, attribute, 3, 3, deviation)
    assert torch.allclose(information, _by_hand(rows, y, attribute, deviation))
    by_class = attribute_information(group_moments(rows, y, attribute, 3, 3), deviation)
    assert by_class.shape == (3, 5)
    assert bool((by_class[0] == 0).all())  # one attribute only
    assert torch.allclose(by_class[1:].mean(0), information)


def test_two_gaussian_groups_give_half_the_log_of_one_plus_a_quarter_of_the_squared_distance():
    attribute = torch.arange(200_000) % 2
    rows = torch.randn(200_000, 2, dtype=torch.float64) * 2 + torch.tensor([0.0, 3.0]) * attribute[:, None]
    information = attribute_information(group_moments(rows, torch.zeros_like(attribute), attribute, 1, 2), floor=0.0)
    assert information[0, 0] < 1e-4
    assert information[0, 1] == pytest.approx(0.5 * math.log(1 + 9 / (4 * 4)), rel=0.02)


def test_the_gradient_in_closed_form_is_autograds():
    rows, y, attribute = _batch()
    deviation = rows.std(0)
    rows.requires_grad_()
    _by_hand(rows, y, attribute, deviation).mul(torch.arange(1.0, 6.0)).sum().backward()
    _, gradient = information_gradient(rows.detach(), y, attribute, 3, 3, deviation)
    assert torch.allclose(gradient * torch.arange(1.0, 6.0), rows.grad, atol=1e-12)
    assert bool((gradient[y == 0] == 0).all())
    assert bool((gradient[y != 0] != 0).all())


class _Information(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, y, attribute, deviation):
        information, gradient = information_gradient(rows, y, attribute, 3, 3, deviation)
        ctx.save_for_backward(gradient)
        return information

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None, None


def test_gradcheck():
    rows, y, attribute = _batch(15)
    deviation = rows.std(0)
    assert torch.autograd.gradcheck(lambda r: _Information.apply(r, y, attribute, deviation), rows.requires_grad_())


def test_rows_that_cannot_count_are_left_out():
    rows, y, attribute = _batch()
    deviation = rows.std(0)
    information, gradient = information_gradient(rows, y, attribute, 3, 3, deviation)
    bad = torch.full((3, 5), 9.0, dtype=torch.float64)
    bad[0, 1] = torch.inf
    more = (
        torch.cat([rows, bad]),
        torch.cat([y, torch.tensor([1, 3, 1])]),
        torch.cat([attribute, torch.tensor([0, 0, 3])]),
    )
    also, gradients = information_gradient(*more, 3, 3, deviation)
    assert torch.allclose(also, information)
    assert torch.allclose(gradients[:-3], gradient)
    assert bool((gradients[-3:] == 0).all())


def test_units_that_are_constant_know_nothing_or_a_bounded_amount():
    y, attribute = torch.zeros(8).long(), torch.arange(8) % 2
    rows = torch.stack([torch.zeros(8), attribute.float()], 1)  # dead; constant within a group
    information, gradient = information_gradient(rows, y, attribute, 1, 2, torch.tensor([0.0, 0.5]))
    assert information.tolist() == [0.0, pytest.approx(0.5 * math.log(101))]
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[:, 0] == 0).all())


def test_the_deviation_of_moments_is_that_of_all_rows():
    rows, y, attribute = _batch()
    assert torch.allclose(group_moments(rows, y, attribute, 3, 3).deviation(), rows.std(0, unbiased=False))
