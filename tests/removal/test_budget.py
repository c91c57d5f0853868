import itertools

import pytest
import torch

from demem.linear import LinearHead
from demem.removal import Examples, Plan, budget, plan_fits, remove_in_rounds

SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.86, 0.9)


def test_small_data_are_fitted_as_ever():
    for classes, units in itertools.product((2, 10), (64, 2048)):
        assert plan_fits(1_200, 2_000, units, classes, 4, SHARES) == Plan(5, 20, 20_000, SHARES)


@pytest.mark.parametrize("classes", [2, 100, 1_000, 20_000])
@pytest.mark.parametrize("units", [64, 2_048, 16_384])
@pytest.mark.parametrize("rows", [100, 5_000, 1_000_000])
def test_the_work_is_bounded(rows, units, classes):
    plan = plan_fits(rows, 20_000, units, classes, 4, SHARES)
    fits = 5 * plan.judged * (4 + len(plan.shares)) + plan.kept
    traced = 20_000 * (len(plan.shares) + 1) if plan.shares else 0
    work = units * (classes + budget.OVERHEAD) * (min(rows, plan.most) * fits + traced)
    assert work <= budget.WORK
    assert plan.most <= budget.ROWS


def test_masks_that_would_take_too_long_are_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(budget, "WORK", 1e5)
    y = torch.arange(80) % 2
    examples = Examples(y[:, None] + 0.1 * torch.randn(80, 4), y, y)
    trained = LinearHead(torch.zeros(2, 4), torch.zeros(2))
    with pytest.warns(UserWarning, match="No units are masked: with 2 classes and 4 units"):
        rounds = remove_in_rounds(examples, examples, trained, num_classes=2, shares=(0.5,))
    assert [round_.share for round_ in rounds] == [0.0, 0.0]
    assert rounds[1].worst == 1.0
